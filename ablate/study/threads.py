"""Threads of processes that train: how many, and how they wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COUNTS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "POLARS_MAX_THREADS",
)
# OpenMP's threads spin while they wait for each other, for milliseconds unless told otherwise. Where other work shares the cores, the
# thread that is waited for is not running, and a step takes ten to forty times as long (docs/cpu.md). After so few turns they sleep, and
# on cores of its own a step is as fast as before.
_SPIN, _POLICY, _TURNS = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "1000"
# glibc gives memory of more than some KiB back to the system when a tensor ends, and the next step faults it in again, page by page:
# a tenth of a step's time (docs/cpu.md). 32 MiB is the most that glibc takes for the first; other C libraries read neither.
_KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def available_cpus() -> int:
    """Return the cores that this process may use: its affinity, and a container's quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def spin_little() -> None:
    """Let OpenMP's threads of this process, and of those that it starts, sleep soon while they wait; before torch is imported.

    What the user has set stays as it is.
    """
    os.environ.update(_waits())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Give processes that are started inside so many threads each, and let them keep the memory of a step for the next."""
    with environment(dict.fromkeys(_COUNTS, str(count)) | _waits() | _memory()):
        yield


def _waits() -> dict[str, str]:
    """Return how threads are to wait; nothing where the user has said so."""
    return {} if _POLICY in os.environ or _SPIN in os.environ else {_SPIN: _TURNS}


def _memory() -> dict[str, str]:
    """Return how memory is to be kept; nothing where the user has said anything of it."""
    return {} if "GLIBC_TUNABLES" in os.environ or _KEEP.keys() & os.environ.keys() else _KEEP


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables that a child process is to find before it imports anything."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is None:
                del os.environ[key]
            else:
                os.environ[key] = old
