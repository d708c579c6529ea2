"""Run one task function on several threads: on torch's own OpenMP threads where torch has them.

A second pool (Numba's, say) beside torch's would fight it: after each parallel region OpenMP threads spin for some
milliseconds, on cores the other pool's threads need. `GOMP_parallel`, which GNU's, LLVM's and Intel's runtimes all
export, runs a callback on the very threads that torch's own operators use.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> Any | None:
    """`GOMP_parallel` of the runtime that torch is linked with, or None: then plain Python threads do."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        # The lookup goes through the module's dependencies, so it finds torch's runtime and no other.
        entry = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.argtypes = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


HUGE_FROM = 16 << 20
"""Bytes from which an allocation comes fresh from the kernel every time (glibc reuses smaller ones)."""


@functools.cache
def _madvise() -> Any | None:
    if sys.platform != "linux":
        return None
    entry = ctypes.CDLL(None).madvise
    entry.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return entry


def advise_huge_pages(address: int, size: int) -> None:
    """Ask for 2 MiB pages for the whole pages in an allocation that has not been touched yet; a hint, no more."""
    entry = _madvise() if size >= HUGE_FROM else None
    if entry is not None:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        entry(start, (address + size - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


def run_on_threads(work: Callable[[], None], threads: int) -> None:
    """Call work() once on each of `threads` threads, this one among them, and wait; the first error is raised here.

    `work` must release the GIL to gain anything, and share out its tasks itself.
    """
    if threads <= 1:
        work()
        return
    entry = _openmp()
    if entry is None:
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(work) for _ in range(threads - 1)]
            work()
        for other in others:
            other.result()
        return
    errors: list[BaseException] = []

    def guarded(_: int | None) -> None:
        try:
            work()
        except BaseException as error:  # carried to the calling thread, where it is raised
            errors.append(error)

    callback = _CALLBACK(guarded)
    entry(callback, None, threads, 0)
    if errors:
        raise errors[0]
