"""Published studies: the tables behind a report kept beside it, so that it can be drawn again without training.

reports/<study>/data/ holds the study file, the plan and the exported tables, small enough for git. From them alone the
findings, the figures and their data are made anew.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import polars as pl

from ablate.config import ConfigError
from ablate.files import replacing_folder
from ablate.report.build import build

DATA = "data"
DRAWN = ("findings.json", "metrics.json", "report.md", "index.html", "figures", "tables", "plots")
"""Everything that a report is made of."""
COMPARED = ("findings.json", "tables/*.csv", "plots/*.csv")
"""What must come out the same, bit for bit; pictures depend on matplotlib's version, too."""


def publish(name: str, root: Path) -> Path:
    """Copy a study's file, plan and tables to reports/<name>/data and make its report; returns that folder.

    Raises:
        ConfigError: the study has no tables or no plan here.
    """
    plan, tables = root / "results" / name / "plan.json", root / "tables" / name
    for path in (plan, tables / "trials.parquet"):
        if not path.exists():
            raise ConfigError(f"{str(path)!r} does not exist: run `ablate study run` and `ablate collect {name}` first")
    kept = root / "reports" / name / DATA
    with replacing_folder(kept) as folder:
        shutil.copyfile(root / "studies" / f"{name}.yaml", folder / "study.yaml")
        for path in (plan, *sorted(tables.glob("*.parquet"))):
            shutil.copyfile(path, folder / path.name)
    redraw(name, root)
    return kept


def published(root: Path) -> list[str]:
    """Names of the studies whose tables are kept."""
    return sorted(path.parent.parent.name for path in root.glob(f"reports/*/{DATA}/study.yaml"))


def size(name: str, root: Path) -> int:
    """Trials of a published study: how long it takes to draw, roughly."""
    return int(pl.scan_parquet(root / "reports" / name / DATA / "trials.parquet").select(pl.len()).collect().item())


def redraw(name: str, root: Path) -> list[str]:
    """Make the findings and the report of a published study anew from what is kept; returns the data files that differ.

    Raises:
        ConfigError: the study is not published here, or what is kept is damaged.
    """
    report = root / "reports" / name
    if not (report / DATA / "study.yaml").exists():
        known = ", ".join(published(root)) or "none"
        raise ConfigError(f"study {name!r} is not published: {known} is; `ablate publish {name}` does it")
    before = _digests(report)
    with tempfile.TemporaryDirectory(prefix=".redraw-", dir=root / "reports") as folder:
        place = Path(folder)
        for path, target in _stage(report / DATA, name, place):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
        made = build(name, place)
        after = _digests(made)
        for part in DRAWN:
            old = report / part
            if old.is_dir():
                shutil.rmtree(old)
            if (made / part).exists():
                (made / part).replace(old)
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def _stage(kept: Path, name: str, place: Path) -> list[tuple[Path, Path]]:
    """Where a project has what is kept."""
    fixed = {
        "study.yaml": place / "studies" / f"{name}.yaml",
        "plan.json": place / "results" / name / "plan.json",
    }
    return [(p, fixed.get(p.name, place / "tables" / name / p.name)) for p in sorted(kept.iterdir())]


def _digests(report: Path) -> dict[str, str]:
    files = (path for pattern in COMPARED for path in report.glob(pattern))
    return {str(p.relative_to(report)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
