"""The tasks that there are: the one place where a trial's settings become a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ablate.config import Trial
from ablate.model.counts import Cost, count
from ablate.tasks.digits import Digits
from ablate.tasks.facts import Facts
from ablate.tasks.language import Language
from ablate.tasks.task import TrialTask
from ablate.tasks.teacher import Teacher

OPEN: dict[str, Callable[[Trial, Path], TrialTask]] = {
    "language": Language,
    "facts": Facts,
    "teacher": Teacher,
    "digits": Digits,
}


def open_task(trial: Trial, data_root: Path) -> TrialTask:
    """Return a trial's task with its data; raises ConfigError for what cannot be used."""
    return OPEN[trial.task.kind](trial, data_root)


def planned_cost(trial: Trial) -> Cost:
    """Return a trial's cost before its data are there; a language model's vocabulary is the one that its settings ask for."""
    if trial.task.kind == "language":
        return count(trial, trial.corpus.vocab_size)
    return open_task(trial, Path()).cost()
