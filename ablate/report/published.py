"""Published studies: the tables behind a report, kept in git beside it, so that it can be drawn without training.

reports/<study>/data.zip holds the study file, the plan and the exported tables, of usage what is read (`trim`). From them
alone the findings, the figures and the data of the figures follow.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from ablate.analysis.frames import canonical, load
from ablate.config import ConfigError
from ablate.files import clear_stale, stale_folders, working_folder, write_text
from ablate.report import trim
from ablate.report.build import build, current_findings
from ablate.report.context import Context
from ablate.results.kept import KEPT, STUDY, pack, table, unpack
from ablate.results.layout import PLAN, TRIALS, USAGE, Layout

CHECKSUMS = "checksums.json"
"""SHA-256 of each table and curve that was drawn, by path: git keeps these, and the files are drawn."""
DRAWN = ("findings.json", CHECKSUMS, "report.md", "index.html", "figures", "tables", "plots")
"""Everything that a published report is made of; what metrics.json says is in the findings."""
COMPARED = ("tables/*.csv", "plots/*.csv")
"""What must come out the same, bit for bit, with findings.json; pictures depend on matplotlib's version, too."""
COMPRESSION = 9
"""Level of zstd: a published table is written once, and above this level hardly anything is gained."""


def publish(name: str, root: Path) -> Path:
    """Pack a study's file, plan and tables into reports/<name>/data.zip and make its report; returns that path.

    Raises:
        ConfigError: the study has no tables or no plan here.
    """
    plan, tables = Layout(root, name).plan, Layout(root, name).tables
    for path in (plan, tables / TRIALS):
        if not path.exists():
            raise ConfigError(f"{str(path)!r} does not exist: run `ablate study run` and `ablate collect {name}` first")
    loaded = load(name, root)
    usage = trim.usage(Context(loaded, current_findings(name, root, loaded.digests)))
    report = Layout(root, name).published
    with _place(root) as place:
        kept = place / "kept"
        kept.mkdir()
        shutil.copyfile(root / "studies" / f"{name}.yaml", kept / STUDY)
        filled = [p for p in sorted(tables.glob("*.parquet")) if pl.scan_parquet(p).head(1).collect().height]
        for path in (plan, *filled):  # a table without rows says no more than one that is not there
            shutil.copyfile(path, kept / path.name)
        if usage is not None:
            usage.write_parquet(kept / USAGE, compression_level=COMPRESSION)
        _stage(kept, report, name, place)
        made = _drawn(name, place)
        # All of it could be drawn: only now the old report goes.
        clear_stale(report)
        pack(kept, report / KEPT)
        _replace(made, report)
    return report / KEPT


def published(root: Path) -> list[str]:
    """Names of the studies whose tables are kept."""
    return sorted(path.parent.name for path in root.glob(f"reports/*/{KEPT}"))


def size(name: str, root: Path) -> int:
    """Trials of a published study: how long it takes to draw, roughly."""
    trials = table(Layout(root, name).published / KEPT, TRIALS)
    return int(pl.scan_parquet(trials).select(pl.len()).collect().item())


def redraw(name: str, root: Path) -> list[str]:
    """Make the findings and the report of a published study from what is kept; returns the data files that differ.

    Raises:
        ConfigError: the study is not published here, or what is kept is damaged.
    """
    report = Layout(root, name).published
    before = _known(report)
    with _place(root) as place:
        staged(name, root, place)
        made = _drawn(name, place)
        after = _known(made)
        _replace(made, report)
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def staged(name: str, root: Path, place: Path) -> None:
    """Put what is kept of a published study into an empty folder, where a project has it.

    Raises:
        ConfigError: the study is not published here, or what is kept is damaged.
    """
    report = Layout(root, name).published
    if not (report / KEPT).exists():
        known = ", ".join(published(root)) or "none"
        raise ConfigError(f"study {name!r} is not published: {known} is; `ablate publish {name}` does it")
    unpack(report / KEPT, place / "kept")
    _stage(place / "kept", report, name, place)


def clear(root: Path) -> None:
    """Delete the folders among the reports in which processes drew that are gone."""
    for stale in stale_folders(root / "reports"):
        shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def _place(root: Path) -> Iterator[Path]:
    """Give a folder among the reports to draw in; those that killed processes left are deleted."""
    clear(root)
    place = working_folder(root / "reports", "redraw")
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _drawn(name: str, place: Path) -> Path:
    """Draw a report in a place of its own, where its data are; returns its folder."""
    made = build(name, place)
    drawn = {str(p.relative_to(made)): _hash(p) for pattern in COMPARED for p in sorted(made.glob(pattern))}
    write_text(made / CHECKSUMS, canonical(drawn))
    return made


def _replace(made: Path, report: Path) -> None:
    """Put everything that was drawn where it belongs."""
    for part in DRAWN:
        old = report / part
        if old.is_dir():
            shutil.rmtree(old)
        if (made / part).exists():
            (made / part).replace(old)


def _stage(kept: Path, report: Path, name: str, place: Path) -> None:
    """Link what is kept to where a project has it, and what tells its report that it is published."""
    project = Layout(place, name)
    fixed = {STUDY: place / "studies" / f"{name}.yaml", PLAN: project.plan}
    links = {path: fixed.get(path.name, project.tables / path.name) for path in sorted(kept.iterdir())}
    links[kept] = project.report / KEPT
    if (report / ".gitignore").exists():
        links[report / ".gitignore"] = project.report / ".gitignore"
    for path, target in links.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.resolve())


def _known(report: Path) -> dict[str, str]:
    """Hashes of the data of a report by path, as far as it has them."""
    findings, sums = report / "findings.json", report / CHECKSUMS
    known: dict[str, str] = json.loads(sums.read_text(encoding="utf-8")) if sums.exists() else {}
    return known | ({findings.name: _hash(findings)} if findings.exists() else {})


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
