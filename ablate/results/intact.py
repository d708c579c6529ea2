"""Whether a study's results are whole: records, and the files beside them, which the records name with digests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate.config import ConfigError
from ablate.files import write_text
from ablate.results.layout import MODEL, SIDE_TABLES, TREES, USAGE, Layout
from ablate.results.seal import digest_of

_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class Damage:
    """A file of a trial that is not what was written."""

    what: str
    """`damaged result`, `damaged file` or `missing file`."""
    path: Path

    def __str__(self) -> str:
        return f"{self.what} {self.path.name}"


def problems(layout: Layout, names: Iterable[str], *, thorough: bool = False) -> dict[str, Damage]:
    """Return what is damaged of finished trials, by trial; most have no entry.

    A file that was found whole is looked at again only after its size or time of change has changed; `thorough` looks
    at all of them and notes nothing.
    """
    cache = layout.state / "index" / f"{layout.study}.intact.json"
    known = {} if thorough else _known(cache)
    sizes = _sizes(layout.results)
    found: dict[str, Damage] = {}
    seen: dict[str, Any] = {}
    for name in names:
        files = sorted((f"{name}.json", *(f"{name}.{table}" for table in SIDE_TABLES)))
        now = {file: list(sizes[file]) for file in files if file in sizes}
        if known.get(name) == now:
            seen[name] = now
        elif problem := _problem(layout, name):
            found[name] = problem
        else:
            seen[name] = now
    if seen != known and not thorough:
        with suppress(OSError):  # It only saves time.
            write_text(cache, json.dumps(seen))
    return found


def set_aside(layout: Layout, name: str) -> Path:
    """Move a trial's record and all beside it to state/damaged, so that the next run trains it again."""
    aside = layout.state / "damaged" / layout.study
    aside.mkdir(parents=True, exist_ok=True)
    for path in (*layout.tables_of(name), *layout.prunes().get(name, []), layout.record(name)):
        if path.exists():
            path.replace(aside / path.name)
    model = layout.folder(name) / MODEL
    if model.exists():
        model.replace(aside / f"{name}.{MODEL}")
    return aside


def _problem(layout: Layout, name: str) -> Damage | None:
    """Return what is wrong with a trial's files, None where nothing is."""
    from ablate.results.record import read_record  # slow to import, and not needed where all is as it was

    try:
        record = read_record(layout.record(name))
    except (ConfigError, FileNotFoundError):
        return Damage("damaged result", layout.record(name))
    tables = layout.side_tables(name)
    digests = record.get("digests", {})
    for made, digest in digests.items():
        path = tables.get(made) or layout.folder(name) / made
        if path.exists() and digest_of(path) != digest:
            return Damage("damaged file", path)
        if not path.exists() and made != MODEL:  # weights may be deleted to save space
            return Damage("missing file", path)
    # Records of earlier versions name no digests.
    wanted = {USAGE} if record["leaves"] else set()
    wanted |= {TREES} if record.get("trees") else set()
    for made, path in tables.items():
        if not path.exists():
            if made in wanted and not digests:
                return Damage("missing file", path)
        elif made not in digests and not _ends_as_table(path):
            return Damage("damaged file", path)
    return None


def _ends_as_table(path: Path) -> bool:
    """Whether a file without a digest begins and ends as a parquet table."""
    with path.open("rb") as file:
        head = file.read(4)
        if head != _MAGIC or file.seek(0, os.SEEK_END) < 12:
            return False
        file.seek(-4, os.SEEK_END)
        return file.read(4) == _MAGIC


def _known(cache: Path) -> dict[str, Any]:
    try:
        data = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file in a folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        stats = {entry.name: entry.stat() for entry in entries if entry.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
