"""Processes that start quickly, and end with the one that started them."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

COLLECT_AFTER = 10_000
"""Objects made before Python looks for dead ones among them. At its own 700 this takes a sixth of the time that torch,
Lightning and MLflow need to be imported, as they make a million objects and throw none away."""


def die_with(parent: int) -> None:
    """End this process as soon as `parent`, which started it, is gone, so that two never work on the same trial."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    # Also where there is no prctl, and for a parent that died before it was called.
    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def kill_descendants() -> None:
    """End all that this process has started, and what that has started, at once.

    But for Python's resource tracker, which removes semaphores once all others are gone, and then ends by itself.
    """
    import psutil

    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    with suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if process.pid != tracker:
                    process.kill()


@contextmanager
def out_of_reach() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started in the block: a terminal sends it to all, and the parent passes it on.

    From their first moment, as a handler of their own, which is set after imports, could not.
    """
    resource_tracker.ensure_running()  # The first process to be started would start it, and it lets signals in again.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guarded(parent: int, work: bytes, *rest: Any) -> None:
    """Run pickled work in a child process that ends with its parent.

    The work is unpickled here, and its modules imported, only after the child is tied to its parent: imports take
    seconds, in which it would otherwise outlive a parent that was killed.
    """
    die_with(parent)
    gc.set_threshold(COLLECT_AFTER)
    pickle.loads(work)(*rest)


@contextmanager
def processes(count: int, begin: Callable[[], object] | None = None) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of child processes that end with this one; where the block raises, they are killed at once.

    Args:
        count: how many processes.
        begin: is called in each before its first work.
    """
    # Not a multiprocessing.Pool: its processes may not have children, which a trial on several devices needs.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (os.getpid(), begin))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        raise
    pool.shutdown()


def _begin(parent: int, begin: Callable[[], object] | None) -> None:
    die_with(parent)
    gc.set_threshold(COLLECT_AFTER)
    if begin is not None:
        begin()
