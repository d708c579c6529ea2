"""What `status` and the queue want to know of every finished trial, kept so that ten thousand records are read once."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from typing_extensions import TypedDict

from ablate.config.endpoints import ENDPOINTS
from ablate.results.layout import Layout
from ablate.results.record import read_record
from ablate.results.seal import unsealed


@dataclass(frozen=True, slots=True)
class Finished:
    """One line of the index: what `status` shows of a finished trial."""

    trial: str
    arm: str
    seed: int
    status: str
    kind: str
    space: str
    values: dict[str, float]
    """What it reached, by endpoint; empty where it diverged."""
    seconds: float
    at: float
    """When its result was written, seconds since the epoch."""
    size: int
    """Of its record, in bytes; with `changed`, it tells whether the record is still the one that was read."""
    changed: int
    """When its record was last written, nanoseconds since the epoch."""


# Only the endpoints' keys: a record has hundreds more, which are skipped where they are read.
if TYPE_CHECKING:
    _Balance = dict[str, float]
    _Task = dict[str, float]
else:
    _Balance = TypedDict("_Balance", {e.name: float for e in ENDPOINTS.values() if e.part == "balance"}, total=False)
    _Task = TypedDict("_Task", {e.name: float for e in ENDPOINTS.values() if e.part == "task"}, total=False)


class _Scored(BaseModel):
    bpb: float | None
    task: _Task = {}
    balance: _Balance = {}


class _Shown(BaseModel):
    """What an index keeps of a record; the rest, nearly all of it, is skipped where it is read and never becomes objects."""

    trial: str
    arm: str
    seed: int
    status: str
    kind: str
    space: str
    seconds: float
    history: list[_Scored]

    def values(self) -> dict[str, float]:
        """Return the last evaluation's endpoints."""
        known = {name: endpoint.value(self.history[-1]) for name, endpoint in ENDPOINTS.items()}
        return {name: value for name, value in known.items() if value is not None}


def index(layout: Layout) -> list[Finished]:
    """Return finished trials, oldest first, from a cache beside the databases: a record is read once, and again when it changes.

    Raises:
        ConfigError: a record is damaged.
    """
    cache = layout.state / "index" / f"{layout.study}.jsonl"
    known = _cached(cache)
    done = layout.done()
    found: list[Finished] = []
    fresh: list[Finished] = []
    for name in sorted(done):
        stat = os.stat(f"{layout.results}/{name}.json")  # a Path each would take as long as reading
        one = known.get(name)
        if one is None or (one.size, one.changed) != (stat.st_size, stat.st_mtime_ns):
            one = _finished(layout, name, stat)
            fresh.append(one)
        found.append(one)
    if fresh:
        with suppress(OSError):  # It only saves time.
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps({slot: getattr(f, slot) for slot in f.__slots__}) + "\n" for f in fresh)
    return sorted(found, key=lambda f: f.at)


def _cached(cache: Path) -> dict[str, Finished]:
    try:
        lines = cache.read_bytes().splitlines()
    except OSError:
        return {}
    known: dict[str, Finished] = {}
    for line in lines:
        try:
            one = Finished(**json.loads(line))
            whole = isinstance(one.trial, str) and isinstance(one.values, dict) and isinstance(one.at, float)
        except (ValueError, TypeError):
            continue  # Cut short by a crash, or of an older version: its record is read again.
        if whole:
            known[one.trial] = one
    return known


def _finished(layout: Layout, name: str, stat: os.stat_result) -> Finished:
    path = layout.record(name)
    try:
        content, _ = unsealed(path.read_bytes())
        record = _Shown.model_validate_json(content)
        values = record.values()
    except (ValueError, IndexError):
        read_record(path)  # Says what is wrong with it.
        raise
    if record.trial != name:
        read_record(path)
    return Finished(
        name,
        record.arm,
        record.seed,
        record.status,
        record.kind,
        record.space,
        values,
        record.seconds,
        stat.st_mtime,
        stat.st_size,
        stat.st_mtime_ns,
    )
