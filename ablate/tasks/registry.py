"""The tasks that there are: the one place where a trial's settings become a task.

Tasks import torch and Lightning, which takes seconds, so they are imported when one is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.config import Trial
from ablate.data.tokens import prepare
from ablate.model.counts import Cost, count

if TYPE_CHECKING:
    from ablate.tasks.task import TrialTask


def tasks() -> dict[str, Callable[[Trial, Path], TrialTask]]:
    """Return what opens a task, by its kind."""
    from ablate.tasks.digits import Digits
    from ablate.tasks.facts import Facts
    from ablate.tasks.language import Language
    from ablate.tasks.teacher import Teacher

    return {"language": Language, "facts": Facts, "teacher": Teacher, "digits": Digits}


def open_task(trial: Trial, data_root: Path) -> TrialTask:
    """Return a trial's task with its data; raises ConfigError for what cannot be used."""
    return tasks()[trial.task.kind](trial, data_root)


def data_card(trial: Trial, data_root: Path) -> dict[str, Any]:
    """Make a task's data ready and return its card; raises ConfigError, as `open_task` does, for what cannot be used."""
    if trial.task.kind == "language" and not trial.questions.tasks:
        return prepare(trial.corpus, data_root).hashed_card
    return open_task(trial, data_root).card


def planned_cost(trial: Trial) -> Cost:
    """Return a trial's cost before its data are there; a language model's vocabulary is the one that its settings ask for."""
    if trial.task.kind == "language":
        return count(trial, trial.corpus.vocab_size)
    return open_task(trial, Path()).cost()
