"""Ctrl-C and SIGTERM: the first ends a command in good order within seconds, the second at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ablate.files import drop_unfinished
from ablate.training.lifeline import kill_descendants

SECONDS = 4.0
"""How long a command has to end in good order where it trains nothing."""
TRAINING_SECONDS = 14.0
"""The same while a trial is saved."""
NUMBERS = (signal.SIGINT, signal.SIGTERM)
WAKE = signal.SIGURG
"""Interrupts a wait of the main thread, so that it looks at the other signals: libraries (polars) put handlers of their own
before Python's, after which the system goes on waiting."""


class Stopped(BaseException):
    """The command was asked to end. Not an Exception: no handler of errors may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stops:
    """What was asked of this process, and how long it has left.

    Python runs a handler only between two of its own instructions, which a library's code can put off for minutes. A
    thread therefore reads the numbers of the signals as the operating system gives them, and ends the process where the
    time is up, or at the second signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal."""
        self.count = 0
        self.seconds = SECONDS
        """From the first signal to the end at the latest."""
        self._noting = False
        self._before: dict[int, Any] = {}
        self._pair: tuple[socket.socket, socket.socket] | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Only note signals while the block runs, instead of raising Stopped; the block looks at `received`."""
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def start(self) -> None:
        """Take the signals over; does nothing outside the main thread, where Python allows no handler."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._pair = socket.socketpair()
        for end in self._pair:
            end.setblocking(False)
        self._before = {number: signal.signal(number, self._handle) for number in NUMBERS}
        self._before[WAKE] = signal.signal(WAKE, lambda number, frame: None)
        signal.set_wakeup_fd(self._pair[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._pair[0],), daemon=True, name="stops").start()

    def end(self) -> None:
        """Give the signals back."""
        if self._pair is None:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._pair[1].close()  # ends the thread
        self._pair = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        first = self.received is None
        if first:
            self.received = number
        if first and not self._noting:
            raise Stopped(number)

    def _watch(self, pipe: socket.socket) -> None:
        pipe.setblocking(True)
        number, began, main = 0, 0.0, int(threading.main_thread().ident or 0)
        while True:
            left = began + self.seconds - time.monotonic() if number else None
            if left is not None and left <= 0:
                end_now(number, "not ended in time")
            # The time left may grow meanwhile, when it turns out that a trial has to be saved.
            pipe.settimeout(None if left is None else min(left, 0.2))
            if number and self.received is None:
                signal.pthread_kill(main, WAKE)
            try:
                got = pipe.recv(64)
            except TimeoutError:
                continue
            except OSError:
                return
            if not got:
                pipe.close()
                return
            asked = [n for n in got if n in NUMBERS]
            if asked and (number or len(asked) > 1):
                end_now(asked[-1], "asked twice")
            if asked:
                number, began = asked[0], time.monotonic()


def end_now(number: int, why: str) -> None:
    """End this process and those that it started, without waiting for anything; what is half written goes."""
    kill_descendants()
    drop_unfinished()
    try:
        sys.stderr.write(f"ablate: ended at once ({why}); what was finished is kept, call the command again\n")
        sys.stderr.flush()
    finally:
        os._exit(128 + number)


_active: Stops | None = None


@contextmanager
def stopping() -> Iterator[Stops]:
    """Take SIGINT and SIGTERM over for a block; within another such block, the same one goes on."""
    global _active
    if _active is not None:
        yield _active
        return
    _active = stops = Stops()
    stops.start()
    try:
        yield stops
    finally:
        stops.end()
        _active = None
