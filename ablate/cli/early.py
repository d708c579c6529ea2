"""Ctrl-C while the command is being imported is a line like any other; import this module first."""

from __future__ import annotations

import sys
from types import TracebackType

_plain = sys.excepthook


def _interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("ablate: stopped before anything was done", file=sys.stderr)
    else:
        _plain(kind, error, trace)


sys.excepthook = _interrupted
