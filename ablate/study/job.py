"""What a worker is given, what it sends back, and what runs a trial for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ablate.config import Trial
from ablate.results.layout import Layout
from ablate.study.designs import Plan
from ablate.study.tracker import Tracker
from ablate.training.result import Observer, TrialResult

EventKind = Literal["planned", "started", "stepped", "finished", "stopped", "retried", "failed", "lost", "fatal"]


class Run(Protocol):
    """What runs one trial: training.trial.run_trial, or anything with its contract."""

    def __call__(
        self, trial: Trial, *, data_root: Path, folder: Path, observer: Observer | None, threads: int | None
    ) -> TrialResult:
        """Train; `folder` keeps what a resumed run needs and gets usage.parquet."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a worker needs; pickled into its process."""

    plan: Plan
    root: Path
    data_root: Path
    storage: str
    tracker: Tracker | None
    run: Run | None
    """None: training.trial.run_trial, imported only where trials run."""
    threads: int

    @property
    def layout(self) -> Layout:
        """Where the study's files lie."""
        return Layout(self.root, self.plan.study.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happened in a worker, for whoever shows progress."""

    worker: str
    kind: EventKind
    trial: str = ""
    arm: str = ""
    seed: int = 0
    step: int = 0
    total: int = 0
    """Steps of the trial; of `planned`, trials of the study."""
    values: tuple[float, ...] | None = None
    """The study's objectives at the trial's end."""
    seconds: float = 0.0
    status: str = ""
    message: str = ""


Report = Callable[[Event], None]
