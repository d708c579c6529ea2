"""One training run in a worker, from its start to its record, whatever happens on the way."""

from __future__ import annotations

import gc
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Protocol

import optuna
from optuna.exceptions import StorageInternalError

from ablate.config import ConfigError, masked
from ablate.files import described, machine_fault
from ablate.results.layout import TREES, USAGE
from ablate.results.record import Record, leaf_deaths, load_record, save_record, tree_means
from ablate.study.designs import PlannedTrial
from ablate.study.job import Event, EventKind, Job, Report
from ablate.study.queue import objective_values
from ablate.study.tracker import TrialTracker
from ablate.training.result import Evaluation, TrialResult

REPORT_SECONDS = 0.5


class Settle(Protocol):
    """The entry in the queue that a run belongs to."""

    heartbeat: AbstractContextManager[None]
    """Open while the run trains."""
    trial: optuna.Trial | None
    """Gets intermediate values and may be pruned; None for a run that may not."""

    def finish(self, record: Record) -> None:
        """Take note of the run's result."""
        ...

    def fail(self, message: str, *, retry: bool, fresh: bool = False) -> bool:
        """Give the entry up; with `retry` it waits again, at most twice unless `fresh`. Returns whether so."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended."""

    record: Record | None
    """Its result; None where it was stopped or failed."""
    goes_on: bool = True
    """False where this worker cannot go on."""


class Attempt:
    """One run, from its start to its record."""

    def __init__(
        self,
        job: Job,
        planned: PlannedTrial,
        worker: str,
        report: Report,
        stopped: Callable[[], bool],
        settle: Settle,
    ) -> None:
        self.job, self.planned, self.settle = job, planned, settle
        self.worker, self.report, self.stopped = worker, report, stopped
        self.layout, self.hash = job.layout, planned.hash
        self.folder = self.layout.folder(self.hash)

    def run(self) -> Ended:
        """Run it, or read its result where it has one."""
        if self.layout.record(self.hash).exists():
            found = load_record(self.layout.record(self.hash))
            record = self._taken_over(found)
            self.settle.finish(record)
            if record is not found:  # otherwise it was counted when it was made
                self._tell("finished", record=record)
            return Ended(record)
        # The model, optimizer and data of the trial before point at each other: without this they stay for many trials more.
        gc.collect()
        self._tell("started")
        tracked = self.job.tracker.open_trial(self.planned, self.layout) if self.job.tracker else None
        try:
            return self._tracked(tracked)
        finally:
            if tracked:
                tracked.close()

    def _taken_over(self, record: Record) -> Record:
        """Give a result of an earlier space of this study its place in the present one."""
        place = {"space": self.job.plan.space, "arm": self.planned.arm, "kind": self.planned.kind}
        if all(getattr(record, key) == value for key, value in place.items()):
            return record
        record = record.model_copy(update={**place, "factors": dict(self.planned.factors)})
        save_record(self.layout, record, self.folder)
        return record

    def _tracked(self, tracked: TrialTracker | None) -> Ended:
        try:
            with self.settle.heartbeat:
                result = self._train(tracked)
            if result.status == "killed":
                self._stopped(tracked)
                return Ended(None)
            return Ended(self._finished(result, tracked))
        except ConfigError as error:
            self._failed(tracked, str(error), retry=False)
        except Exception as error:
            # The boundary of one trial: whatever went wrong inside it must not end the study.
            if machine_fault(error) or isinstance(error, StorageInternalError):
                self._stop_for(tracked, f"this machine could not go on: {masked(described(error))}")
                return Ended(None, goes_on=False)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "error.txt").write_text(masked(traceback.format_exc()), encoding="utf-8")
            except OSError as full:
                self._stop_for(tracked, f"this machine could not go on: {described(full)}")
                return Ended(None, goes_on=False)
            self._failed(tracked, masked(f"{type(error).__name__}: {error}"), retry=True)
        return Ended(None)

    def _train(self, tracked: TrialTracker | None) -> TrialResult:
        run = self.job.run
        if run is None:
            from ablate.training.trial import run_trial

            run = run_trial
        watch = _Watch(self, tracked)
        return run(
            self.planned.trial,
            data_root=self.job.data_root,
            folder=self.folder,
            observer=watch,
            threads=self.job.threads,
        )

    def _finished(self, result: TrialResult, tracked: TrialTracker | None) -> Record:
        record = Record(
            **dict(result),
            study=self.job.plan.study.name,
            space=self.job.plan.space,
            trial=self.hash,
            arm=self.planned.arm,
            kind=self.planned.kind,
            seed=self.planned.seed,
            factors=dict(self.planned.factors),
            run_id=tracked.run_id if tracked else None,
            leaves=leaf_deaths(self.folder / USAGE),
            trees=tree_means(self.folder / TREES),
        )
        save_record(self.layout, record, self.folder)
        self.settle.finish(record)
        if tracked:
            tracked.finish(record, self.layout.tables_of(self.hash))
        if not self.planned.trial.train.keep_checkpoint:
            shutil.rmtree(self.folder, ignore_errors=True)
        for name in self.layout.side_tables(self.hash):  # copied beside the record; only weights stay
            (self.folder / name).unlink(missing_ok=True)
        self._tell("finished", record=record)
        return record

    def _stopped(self, tracked: TrialTracker | None) -> None:
        self.settle.fail("stopped when asked", retry=True, fresh=True)
        if tracked:
            tracked.abandon("killed", "stopped when asked; the next run of the study goes on from its checkpoint")
        self._tell("stopped")

    def _failed(self, tracked: TrialTracker | None, message: str, *, retry: bool) -> None:
        again = self.settle.fail(message, retry=retry)
        if tracked:
            tracked.abandon("failed", message)
        self._tell("retried" if again else "failed", message=message)

    def _stop_for(self, tracked: TrialTracker | None, message: str) -> None:
        """The machine cannot go on: leave the trial for the next run of the study, as far as the machine lets us."""
        # What cannot be written, the next run sees for itself: a trial that is RUNNING without a worker.
        with suppress(OSError, StorageInternalError):
            self.settle.fail(message, retry=True, fresh=True)
        if tracked:
            with suppress(OSError):
                tracked.abandon("killed", message)
        self._tell("fatal", message=message)

    def _tell(
        self,
        kind: EventKind,
        *,
        record: Record | None = None,
        message: str = "",
        step: int = 0,
    ) -> None:
        self.report(
            Event(
                worker=self.worker,
                kind=kind,
                trial=self.hash,
                arm=self.planned.arm,
                seed=self.planned.seed,
                step=step,
                total=self.planned.trial.train.steps,
                values=_values(self.job, record) if record else None,
                seconds=record.seconds if record else 0.0,
                status=record.status if record else "",
                message=message,
            )
        )


class _Watch:
    """The observer of one trial: tracking, pruning, progress and being asked to stop."""

    def __init__(self, attempt: Attempt, tracked: TrialTracker | None) -> None:
        self.attempt, self.tracked = attempt, tracked
        self._told = 0.0

    def evaluated(self, evaluation: Evaluation) -> bool:
        """Track an evaluation; True where the study's pruner gives the trial up."""
        if self.tracked:
            self.tracked.evaluated(evaluation)
        trial, study = self.attempt.settle.trial, self.attempt.job.plan.study
        if trial is None or len(study.objectives) > 1 or evaluation.step == 0:
            return False
        value = study.goals[0].value(evaluation)
        if value is None:
            return False
        settings, unit = self.attempt.planned.trial, study.trial({})
        per_evaluation = unit.train.eval_every * unit.train.batch_size * unit.positions
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A resumed run reports some of its steps a second time.
            trial.report(value, max(1, round(evaluation.tokens / per_evaluation)))
        return study.pruner is not None and evaluation.step < settings.train.steps and trial.should_prune()

    def stepped(self, step: int, total: int) -> bool:
        """Show progress, at most twice a second; True once the worker is asked to stop."""
        now = time.monotonic()
        if now - self._told > REPORT_SECONDS:
            self._told = now
            self.attempt._tell("stepped", step=step)
        return self.attempt.stopped()


def _values(job: Job, record: Record) -> tuple[float, ...] | None:
    values = objective_values(job.plan.study, record)
    return None if values is None else tuple(values)
