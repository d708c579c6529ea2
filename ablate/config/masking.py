"""Secrets in addresses: one function takes them out of every text, one sees to logs and tracebacks."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from types import TracebackType
from typing import Any

# `//user:password@` up to the last @, as people forget to encode one in a password; `//token@`; `?password=…`.
_PASSWORD = re.compile(r"//([^\s'\"/@:]*):[^\s'\"]*@")
_TOKEN = re.compile(r"//(?!\*\*\*)[^\s'\"/@:]+@")
_OPTION = re.compile(r"(?i)([?&](?:[a-z_]*password|passwd|pwd|[a-z_]*token|[a-z_]*secret|[a-z_]*key)=)[^&\s'\"]*")


def masked(text: str) -> str:
    """Return a text in which every URL has `***` in place of its password, token or secret option."""
    if "//" not in text:
        return text
    return _OPTION.sub(r"\1***", _TOKEN.sub("//***@", _PASSWORD.sub(r"//\1:***@", text)))


def mask_output() -> None:
    """Mask what this process logs, and the tracebacks that it prints, from here on."""
    make = logging.getLogRecordFactory()
    if getattr(make, "masks", False):
        return

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with suppress(TypeError, ValueError):  # A wrong format; logging says so itself.
            made.msg, made.args = masked(made.getMessage()), ()
        if made.exc_info and made.exc_info[0]:
            made.exc_text = masked("".join(traceback.format_exception(*made.exc_info)).rstrip())
        return made

    record.masks = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: masked(plain(*args, **kwargs))
    sys.excepthook = _print
    threading.excepthook = lambda args: _print(args.exc_type, args.exc_value, args.exc_traceback)


def _print(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
