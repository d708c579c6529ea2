"""What tables and sections share: the columns of a table of arms, and the sentence on data that a study lacks."""

from __future__ import annotations

from typing import Literal

from ablate.report.context import Context
from ablate.report.parts import Column

N, RUNS = Column("n", "n", "d"), Column("runs", "runs", "runs")
Given = str | tuple[str, str] | tuple[str, str, str]
"""A column's title, its title and number format, or both and a sentence of help."""
Need = Literal["balance", "history", "usage", "quality"]

LACKING: dict[Need, str] = {
    "balance": "No tree arm with balance measured",
    "history": "No balance in the history table",
    "usage": "No usage table",
}


def columns(first: str = "arm", /, **given: Given | None) -> list[Column]:
    """Return the columns of a table whose rows are arms: the arm, those given by key, then n and runs.

    `n` and `runs` keep the place and title that they are given; None leaves one out. `first` titles the first column.
    """
    own = cells(arm=first, **{key: one for key, one in given.items() if one is not None})
    return [*own, *(column for column in (N, RUNS) if column.key not in given)]


def cells(**given: Given) -> list[Column]:
    """Return these columns and no others."""
    return [Column(key, *((one,) if isinstance(one, str) else one)) for key, one in given.items()]


def needs(c: Context, what: Need) -> str:
    """Return what the study lacks and the commands that measure it, or "" where it has such data."""
    known = {
        "balance": lambda: bool(c.trees),
        "history": lambda: c.history["n_eff_frac"].count() > 0,
        "usage": lambda: bool(c.usage),
        "quality": lambda: not c.finished.is_empty(),
    }[what]()
    return "" if known else absent(c, LACKING.get(what, f"No finished run with {c.quality.label}"))


def absent(c: Context, what: str) -> str:
    """Return the sentence on `what` is not there, with the commands that run the study and collect its tables."""
    name = c.tables.name
    return f"{what}: run `ablate study run studies/{name}.yaml`, then `ablate collect {name}`."
