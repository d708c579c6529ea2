"""Ctrl-C and SIGTERM before a command works and after it has: a line and an exit code, as while it works."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from types import FrameType

GOES_ON = "what was finished is kept, call the command again and it goes on"
NUMBERS = (signal.SIGINT, signal.SIGTERM)
_registered = False


def answer(words: str) -> None:
    """End the process at SIGINT and SIGTERM from now on: print `ablate: ` and the words, exit with 128 + the signal's number.

    Python's last moments, in which it would let a signal kill it, are kept from both. Does nothing outside the main
    thread, where Python allows no handler.
    """
    global _registered
    if threading.current_thread() is not threading.main_thread():
        return

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"ablate: {words}\n".encode())
        os._exit(128 + number)

    for number in NUMBERS:
        signal.signal(number, end)
    if not _registered:
        _registered = True
        atexit.register(_ignore)  # The first that is registered is the last that is called.


def _ignore() -> None:
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
