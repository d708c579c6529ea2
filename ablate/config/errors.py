"""The error of everything that a user gives, and how it shows values."""

from __future__ import annotations

import reprlib
from typing import Any

from ablate.config.masking import masked


class ConfigError(ValueError):
    """A setting that cannot be used; its message is one line that names the key, echoes the value, says what is allowed."""

    def __str__(self) -> str:
        return masked(super().__str__())


def echo(value: Any) -> str:
    """Return a value as an error message shows it: at most 80 characters, however large it is."""
    short = _Echo().repr(value)
    return short if len(short) <= 80 else short[:77] + "..."


def reason(error: BaseException) -> str:
    """Return an error's first line, or its type where it has no text."""
    text = getattr(error, "strerror", None) or str(error)
    return one_line(next(iter(text.splitlines()), "")) or type(error).__name__


def one_line(text: str) -> str:
    """Return a text with everything that a terminal would not print as it is (line ends, colours) written as Python does."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Echo(reprlib.Repr):
    """`repr` that looks at the beginning of a value only."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, 120, 120, 120
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print a whole number of more than 4,300 digits.
        return f"a number of {value.bit_length()} bits" if value.bit_length() > 4000 else super().repr_int(value, level)
