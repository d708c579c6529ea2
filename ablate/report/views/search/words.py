"""Names, marks and forms that the sections of a search share."""

from __future__ import annotations

from typing import Any

from ablate.config.endpoints import ENDPOINTS, label_of
from ablate.report.context import Context
from ablate.report.parts import Column
from ablate.report.wording import short


def axis(c: Context, objective: str) -> str:
    """Return an objective's axis label, with the side that is better."""
    return f"{label_of(objective)} ({better(c, objective)} is better)"


def better(c: Context, objective: str) -> str:
    """Return lower or higher."""
    return ENDPOINTS[objective].better


def objectives(c: Context) -> list[str]:
    """Return the names of the objectives, in the study's order."""
    return [str(o["objective"]) for o in c.findings["search"]["objectives"]]


def form(objective: str) -> str:
    """Return the number format of an objective."""
    return ENDPOINTS[objective].form


def sound(c: Context) -> list[dict[str, Any]]:
    """Return the candidates that have a rank, best first."""
    return [r for r in c.findings["search"]["candidates"] if r["rank"] is not None]


def setting_columns(c: Context) -> list[Column]:
    """Return one column a setting that differs between candidates."""
    return [Column(f"set {f}", short(f)) for f in c.findings["search"]["factors"]]


def short_names(names: list[str], most: int = 6) -> str:
    """Return names as a list in words, cut after `most`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def nothing(c: Context) -> str:
    """Return what to do where no candidate finished."""
    return f"No candidate finished without a diverged run: run `ablate study run studies/{c.tables.name}.yaml` on."
