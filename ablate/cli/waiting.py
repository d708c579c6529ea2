"""What a user sees while a command works: lines on stderr for what takes longer than a second, steps of a training."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it needs torch
    from ablate.training.result import Evaluation

AGAIN = 3.0
"""Seconds between two lines."""


def say(text: str) -> None:
    """Print a line for people on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def busy(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Say what is being done, where it takes longer than a second, and again while it goes on; `quiet` says nothing."""
    ended = threading.Event()

    def tell() -> None:
        started = time.monotonic()
        if not ended.wait(1.0):
            say(f"{text} ...")
        while not ended.wait(AGAIN):
            say(f"{text}: {time.monotonic() - started:.0f} s ...")

    if not quiet:
        threading.Thread(target=tell, daemon=True, name="busy").start()
    try:
        yield
    finally:
        ended.set()


class Steps:
    """Watches one training: a line every few seconds (training.result.Observer)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._said = time.monotonic()

    def evaluated(self, evaluation: Evaluation) -> bool:
        """Receive an evaluation; the training goes on."""
        return False

    def stepped(self, step: int, total: int) -> bool:
        """Say how far the training is; it goes on."""
        now = time.monotonic()
        if not self.quiet and now - self._said > AGAIN:
            self._said = now
            say(f"step {step} of {total}")
        return False
