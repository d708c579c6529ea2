"""Where each file of a study lies, and the name of every file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PLAN = "plan.json"
# Tables of a trial, in its folder; beside its record with the trial's hash before the name; of all trials in tables/.
USAGE = "usage.parquet"
TREES = "trees.parquet"
MOTION = "motion.parquet"
# Bits and bytes of each window of the last evaluation; of all trials, means by arm.
WINDOWS = "windows.parquet"
# What each question gave; of one trial or evaluation.
ITEMS = "items.parquet"
# Tables of all trials.
TRIALS = "trials.parquet"
HISTORY = "history.parquet"
PRUNE = "prune.parquet"
RATES = "rates.parquet"
# Between a trial's hash and the threshold it was pruned at.
PRUNE_MARK = ".prune-"
SIDE_TABLES = (USAGE, TREES, MOTION, WINDOWS, ITEMS)
# Other files in a trial's folder: the state to go on from, the final weights, pruned weights, an evaluation's scores.
LAST = "last.ckpt"
MODEL = "model.pt"
PRUNED = "pruned.pt"
EVALUATION = "evaluation.json"
# Folder of the project with what a user's own trials show; reports/ holds published studies.
OWN = "out"


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
        return self.results / PLAN

    @property
    def state(self) -> Path:
        """Live databases, locks and checkpoints: outside DVC."""
        return self.root / "state"

    @property
    def finished(self) -> Path:
        """A note that the study is done, with what it was made of (study.outcome)."""
        return self.state / "finished" / f"{self.study}.json"

    @property
    def tables(self) -> Path:
        """What `collect` writes."""
        return self.root / "tables" / self.study

    @property
    def report(self) -> Path:
        """Findings and report of the user's own trials; `published` is never written over by them."""
        return self.root / OWN / self.study

    @property
    def published(self) -> Path:
        """Findings and report that git keeps, with the tables they are drawn from; `ablate publish` writes it."""
        return self.root / "reports" / self.study

    def record(self, trial: str) -> Path:
        """A trial is done exactly if this file exists."""
        return self.results / f"{trial}.json"

    def usage(self, trial: str) -> Path:
        """The trial's leaf usage over training."""
        return self.results / f"{trial}.{USAGE}"

    def trees(self, trial: str) -> Path:
        """The trial's numbers a tree over training (flips, informativeness, ceiling)."""
        return self.results / f"{trial}.{TREES}"

    def motion(self, trial: str) -> Path:
        """How far router and representation moved each node, for trials with train.motion."""
        return self.results / f"{trial}.{MOTION}"

    def windows(self, trial: str) -> Path:
        """Bits and bytes of each window of the trial's last evaluation; trials of before have none."""
        return self.results / f"{trial}.{WINDOWS}"

    def items(self, trial: str) -> Path:
        """What each question gave, for trials with questions."""
        return self.results / f"{trial}.{ITEMS}"

    def names(self) -> set[str]:
        """Names of all files of the results folder: one look at ten thousand trials instead of one each."""
        return {entry.name for entry in os.scandir(self.results)} if self.results.is_dir() else set()

    def side_tables(self, trial: str) -> dict[str, Path]:
        """Where the tables beside a trial's record lie, by the name they have in the trial's folder."""
        return {
            USAGE: self.usage(trial),
            TREES: self.trees(trial),
            MOTION: self.motion(trial),
            WINDOWS: self.windows(trial),
            ITEMS: self.items(trial),
        }

    def tables_of(self, trial: str) -> list[Path]:
        """Return the tables in a trial's folder."""
        return [path for path in self.side_tables(trial).values() if path.exists()]

    def prune(self, trial: str, threshold: float) -> Path:
        """What pruning the trial at a threshold showed (balance.prune.PruneReport)."""
        return self.results / f"{trial}{PRUNE_MARK}{threshold!r}.json"

    def prunes(self) -> dict[str, list[Path]]:
        """All such files, by trial."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self.results.glob(f"*{PRUNE_MARK}*.json")):
            found.setdefault(path.name.partition(PRUNE_MARK)[0], []).append(path)
        return found

    def folder(self, trial: str) -> Path:
        """Checkpoints of a trial that is not done."""
        return self.state / "trials" / trial

    def done(self) -> set[str]:
        """Hashes of all finished trials in the results folder, of this plan or an earlier one."""
        return {n[:-5] for n in self.names() if n.endswith(".json") and PRUNE_MARK not in n and n != PLAN}
