"""A trial's tracking events on disk, written before they are sent: a server that is away costs nothing but a delay."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablate.results.layout import Layout
from ablate.tracking import tags as names

Event = dict[str, Any]
_WANTED: Mapping[str, Mapping[str, Any]] = {
    "open": {"time": int, "experiment": str, "name": str, "tags": dict, "params": dict, "card": dict | None},
    "run": {"run_id": str},
    "reopen": {},
    "metrics": {"time": int, "step": int, "values": dict},
    "close": {"time": int, "step": int, "status": str, "tags": dict, "metrics": dict, "tables": list},
}
"""What each kind of event has at least, with its types."""

_log = logging.getLogger(__name__)


class Spool:
    """An append-only file of events, one JSON line each; it outlives the process that wrote it.

    Sending the same events again is harmless: metrics carry the time of their first writing, and MLflow keeps one row
    for equal key, step, time and value.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = _read(path)
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, event: Event) -> None:
        """Add an event; it is in the file when this returns."""
        line = json.dumps(event)
        with self.path.open("a", encoding="utf-8") as file:
            # A line that a crash cut short is ended, so that this one starts on a new line.
            file.write(line + "\n" if self._whole() else "\n" + line + "\n")
        self.events.append(event)

    def remove(self) -> None:
        """Everything was sent."""
        self.path.unlink(missing_ok=True)

    @property
    def run_id(self) -> str | None:
        """The run that the events went to so far."""
        return next((e["run_id"] for e in self.events if e["event"] == "run"), None)

    @property
    def steps(self) -> set[int]:
        """Steps of the evaluations already written; a resumed trial evaluates some of them again."""
        return {e["step"] for e in self.events if e["event"] == "metrics"}

    @property
    def closed(self) -> bool:
        """Whether the trial's last word is here: it has a result, or was given up."""
        return self.last.get("event") == "close"

    @property
    def last(self) -> Event:
        """The last event of the trial itself; the note of its run's id may follow it."""
        return next((e for e in reversed(self.events) if e["event"] != "run"), {})

    def _whole(self) -> bool:
        try:
            with self.path.open("rb") as file:
                file.seek(-1, 2)
                return file.read(1) == b"\n"
        except OSError:
            return True


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Values that a metric can hold; those that are missing, NaN or infinite are left out."""
    return {key: float(v) for key, v in values.items() if v is not None and math.isfinite(v)}


def spool_path(layout: Layout, trial: str) -> Path:
    """Where a trial's unsent events lie."""
    return layout.state / "spool" / layout.study / f"{trial}.jsonl"


def ends_with_result(spool: Spool) -> bool:
    """Whether the trial is done for good, so that no later attempt needs to know what was sent."""
    return spool.closed and spool.last["tags"][names.STATUS] not in {"killed", "failed"}


def _read(path: Path) -> list[Event]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events: list[Event] = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # The line during which the process was killed.
        if not _is_event(event):
            _log.warning("%s has a line that is no event: it is left out", path)
        elif events or event["event"] in {"open", "run"}:  # Without its beginning, nobody knows where a rest belongs.
            events.append(event)
    return events


def _is_event(event: Any) -> bool:
    """Whether a line of a spool is an event with all that sending it needs."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    wanted = _WANTED.get(event["event"])
    return wanted is not None and all(isinstance(event.get(key), kind) for key, kind in wanted.items())
