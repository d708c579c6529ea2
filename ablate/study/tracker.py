"""What a study asks of a tracking service. tracking.tracker implements it for MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ablate.results.layout import Layout
from ablate.results.record import Record
from ablate.study.designs import Plan, PlannedTrial
from ablate.training.result import Observer


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
        """End the trial's tracking; nothing follows, even where the end could not be sent."""
        ...


class Tracker(Protocol):
    """A tracking service, as far as studies know it; pickled into workers. tracking.tracker has the real one."""

    def check(self, layout: Layout, say: Callable[[str], None]) -> None:
        """Before anything that takes long: make the store ready; `say` shows a line. Raises ConfigError where it cannot be
        used."""
        ...

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
