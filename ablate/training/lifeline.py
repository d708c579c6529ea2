"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time


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
