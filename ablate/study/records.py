"""What a study leaves on disk: its plan, one immutable JSON a trial beside its usage table, and where each lies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl
from pydantic import Field, ValidationError

from ablate.balance import metrics, usage
from ablate.config import ConfigError, Scalar, digest
from ablate.files import replacing, write_text
from ablate.study.designs import Kind, Plan, PlannedTrial
from ablate.training.result import Observer, TrialResult

if TYPE_CHECKING:  # it needs torch, which those who only read results do without
    from ablate.balance.prune import PruneReport

# Tables that a trial leaves in its folder.
USAGE = "usage.parquet"
TREES = "trees.parquet"
MOTION = "motion.parquet"
PRUNE = ".prune-"
ITEMS = "items.parquet"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a study's files lie under the project's root."""

    root: Path
    study: str

    @property
    def results(self) -> Path:
        """The study stage's persisted output: plan.json, `<trial>.json`, its tables and what pruning it showed."""
        return self.root / "results" / self.study

    @property
    def plan(self) -> Path:
        """The hashed plan."""
        return self.results / "plan.json"

    @property
    def state(self) -> Path:
        """Live databases, locks and checkpoints: outside DVC."""
        return self.root / "state"

    @property
    def tables(self) -> Path:
        """What `collect` writes."""
        return self.root / "tables" / self.study

    def record(self, trial: str) -> Path:
        """A trial is done exactly if this file exists."""
        return self.results / f"{trial}.json"

    def usage(self, trial: str) -> Path:
        """The trial's leaf usage over training."""
        return self.results / f"{trial}.usage.parquet"

    def trees(self, trial: str) -> Path:
        """The trial's numbers a tree over training (flips, informativeness, ceiling)."""
        return self.results / f"{trial}.trees.parquet"

    def motion(self, trial: str) -> Path:
        """How far router and representation moved each node, for trials with train.motion."""
        return self.results / f"{trial}.motion.parquet"

    def items(self, trial: str) -> Path:
        """What each question gave, for trials with questions."""
        return self.results / f"{trial}.items.parquet"

    def side_tables(self, trial: str) -> dict[str, Path]:
        """Where the tables beside a trial's record lie, by the name they have in the trial's folder."""
        return {
            USAGE: self.usage(trial),
            TREES: self.trees(trial),
            MOTION: self.motion(trial),
            ITEMS: self.items(trial),
        }

    def tables_of(self, trial: str) -> list[Path]:
        """The tables that lie beside a trial's record."""
        return [path for path in self.side_tables(trial).values() if path.exists()]

    def prune(self, trial: str, threshold: float) -> Path:
        """What pruning the trial at a threshold showed (balance.prune.PruneReport)."""
        return self.results / f"{trial}{PRUNE}{threshold!r}.json"

    def prunes(self) -> dict[str, list[Path]]:
        """All such files, by trial."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self.results.glob(f"*{PRUNE}*.json")):
            found.setdefault(path.name.partition(PRUNE)[0], []).append(path)
        return found

    def folder(self, trial: str) -> Path:
        """Checkpoints of a trial that is not done."""
        return self.state / "trials" / trial

    def done(self) -> set[str]:
        """Hashes of all finished trials in the results folder, of this plan or an earlier one."""
        if not self.results.is_dir():
            return set()
        names = (entry.name for entry in os.scandir(self.results))
        return {name[:-5] for name in names if name.endswith(".json") and PRUNE not in name and name != "plan.json"}


class Record(TrialResult):
    """A trial's result with its place in the study."""

    study: str
    space: str
    """Hash of the space that the study had then."""
    trial: str
    arm: str
    kind: Kind
    seed: int
    factors: dict[str, Scalar]
    run_id: str | None
    """MLflow's run; None where the server was away when the trial ended (the run carries the trial's hash as a tag)."""
    leaves: dict[str, float]
    """Births and deaths of leaves over the held-out evaluations: balance.metrics.Deaths.shares, mean over trees, and
    counts of dead leaves at the first and the last evaluation; empty without a tree."""
    trees: dict[str, float] = Field(default_factory=dict)
    """Last evaluation's columns of balance.usage.TREES_SCHEMA, mean over layers and trees; empty without a tree."""


class TrialTracker(Observer, Protocol):
    """Follows one trial into the tracking server."""

    @property
    def run_id(self) -> str | None:
        """Known once the server has been reached."""
        ...

    def finish(self, record: Record, tables: Sequence[Path]) -> None:
        """The trial ended with a result."""
        ...

    def abandon(self, status: str, message: str) -> None:
        """The trial ended without a result: `killed` (it will go on later) or `failed`."""
        ...

    def close(self) -> None:
        """Nothing follows, whether or not the trial's end could be told."""
        ...


class Tracker(Protocol):
    """A tracking service, as far as studies know it; pickled into workers. tracking.mlflow has the real one."""

    def start_study(self, plan: Plan, layout: Layout, card: dict[str, Any] | None) -> None:
        """Before any worker starts, once: make the store ready, open the study's run, send what an earlier run of the
        study could not. `card` is the corpus's data card. Raises ConfigError where the server cannot be used.
        """
        ...

    def open_trial(self, planned: PlannedTrial, layout: Layout) -> TrialTracker:
        """In a worker, before a trial starts or goes on."""
        ...

    def end_study(self, plan: Plan, layout: Layout, status: str) -> None:
        """All workers are gone: send what is unsent, close the study's run as `finished`, `failed` or `killed`."""
        ...


def save_record(layout: Layout, record: Record, folder: Path) -> None:
    """Make a trial done: the tables in its folder first, then its record, each in one step."""
    for made, kept in layout.side_tables(record.trial).items():
        if (folder / made).exists():
            with replacing(kept) as partial:
                shutil.copyfile(folder / made, partial)
    write_text(layout.record(record.trial), record.model_dump_json(indent=1) + "\n")


def save_prune(root: Path, trial: str, report: PruneReport) -> list[Path]:
    """Put what pruning a trial showed beside its result in every study that has it; a threshold's earlier one goes."""
    studies = [p.parent.name for p in sorted((root / "results").glob(f"*/{trial}.json"))]
    kept = [Layout(root, study).prune(trial, report.threshold) for study in studies]
    for path in kept:
        write_text(path, report.model_dump_json(indent=1) + "\n")
    return kept


def load_record(path: Path) -> Record:
    """Read a record; raises ConfigError for one that is damaged."""
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"result {str(path)!r} is damaged ({error.errors()[0]['msg']}): delete it and run the study again"
        ) from None


def leaf_deaths(table: Path) -> dict[str, float]:
    """Births and deaths of leaves from a usage table (window `held_out`), for `Record.leaves`; {} without a tree."""
    frame = pl.read_parquet(table) if table.exists() else pl.DataFrame()
    if frame.is_empty():
        return {}
    deaths = metrics.deaths(usage.counts_from(frame))
    shares = {name: float(value.mean()) for name, value in deaths.shares().items()}
    ends = {"dead_start": ~deaths.alive_at_start, "dead_end": ~deaths.alive_at_end}
    return shares | {name: float(dead.sum()) for name, dead in ends.items()}


def tree_means(table: Path) -> dict[str, float]:
    """Last evaluation's means over layers and trees, for `Record.trees`; {} without a tree."""
    frame = pl.read_parquet(table) if table.exists() else pl.DataFrame()
    if frame.is_empty():
        return {}
    last = frame.filter(pl.col("step") == pl.col("step").max()).drop("step", "layer", "tree")
    means = last.select(pl.all().fill_nan(None).mean()).row(0, named=True)
    return {name: float(value) for name, value in means.items() if value is not None}


def plan_document(
    plan: Plan, tuned: dict[str, Any] | None = None, search: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The plan as plain data for plan.json."""
    study = plan.study
    return {
        "study": study.name,
        "title": study.title,
        "design": study.design,
        "hash": plan.hash,
        "space": plan.space,
        "study_hash": digest({"title": study.title, "notes": study.notes, **study.settled()}),
        "seeds": study.seeds,
        "objectives": study.objectives,
        "notes": list(plan.notes),
        "arms": [
            {"label": arm.label, "kind": arm.kind, "changes": dict(arm.changes), "derived": arm.derived}
            for arm in plan.arms
        ],
        "trials": [
            {
                "trial": t.hash,
                "arm": t.arm,
                "kind": t.kind,
                "seed": t.seed,
                "lr": t.trial.train.lr,
                "factors": dict(t.factors),
            }
            for t in plan.trials
        ],
        "waiting_for_tune": plan.waiting_for_tune,
        "tuned": tuned or {},
        **({"search": {"budget": study.budget.model_dump(), **(search or {})}} if study.design == "search" else {}),
    }


def save_plan(
    layout: Layout, plan: Plan, tuned: dict[str, Any] | None = None, search: dict[str, Any] | None = None
) -> None:
    """Write plan.json, before the first trial.

    Raises:
        ConfigError: the study is a `confirm` whose plan was hashed before and is another now.
    """
    old = load_plan(layout)
    if plan.study.design == "confirm" and old and old.get("hash") != plan.hash:
        raise ConfigError(
            f"plan hash is {plan.hash}: study {plan.study.name!r} was fixed as {old.get('hash')} before its first "
            f"trial, and a confirm plan may not change; restore the file or start a study with another name"
        )
    text = json.dumps(plan_document(plan, tuned, search), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if not layout.plan.exists() or layout.plan.read_text(encoding="utf-8") != text:
        write_text(layout.plan, text)


def load_plan(layout: Layout) -> dict[str, Any] | None:
    """plan.json as plain data, None where there is none; raises ConfigError for a damaged one."""
    try:
        data = json.loads(layout.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"plan {str(layout.plan)!r} is damaged: delete it and run the study again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"plan {str(layout.plan)!r} is damaged: delete it and run the study again")
    return data
