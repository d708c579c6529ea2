"""Processes that start quickly, and end with the one that started them."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import threading
import time
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


def guarded(parent: int, work: bytes, *rest: Any) -> None:
    """Run pickled work in a child process that ends with its parent.

    The work is unpickled here, and its modules imported, only after the child is tied to its parent: imports take
    seconds, in which it would otherwise outlive a parent that was killed.
    """
    die_with(parent)
    gc.set_threshold(COLLECT_AFTER)
    pickle.loads(work)(*rest)
