"""The worker: claims trials and runs them, one by one, until none waits. Local processes and Ray tasks run this."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from optuna.exceptions import StorageInternalError

from ablate.config import ConfigError, Scalar, Trial
from ablate.study.designs import Plan, PlannedTrial, factor_keys, factor_values, label_of, settings
from ablate.study.queue import Claim, Queue, open_storage
from ablate.study.records import (
    TREES,
    USAGE,
    Layout,
    Record,
    Tracker,
    TrialTracker,
    leaf_deaths,
    load_record,
    save_record,
    tree_means,
)
from ablate.training.result import Evaluation, Observer, TrialResult

REPORT_SECONDS = 0.5
# More impossible candidates than this in a row, and the search's factors hardly ever form a valid trial.
MAX_IMPOSSIBLE = 100


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
    """News from a worker, for whoever shows progress."""

    worker: str
    kind: Literal["started", "stepped", "finished", "stopped", "retried", "failed", "fatal"]
    trial: str = ""
    arm: str = ""
    seed: int = 0
    step: int = 0
    total: int = 0
    bpb: float | None = None
    seconds: float = 0.0
    status: str = ""
    message: str = ""


Report = Callable[[Event], None]


def work(job: Job, name: str, report: Report, stopped: Callable[[], bool]) -> None:
    """Run waiting trials until there is none, `stopped` says so, or the machine cannot go on (a `fatal` event)."""
    seed = zlib.crc32(f"{job.plan.space} {name} {len(job.layout.done())}".encode())
    queue = Queue(job.plan, open_storage(job.storage), seed)
    planned = {t.hash: t for t in job.plan.trials}
    meter = _Meter(job)
    impossible = 0
    while not stopped() and not meter.exhausted():
        claim = queue.claim(name)
        if claim is None:
            return
        if job.plan.study.design == "search":
            candidate = _candidate(job, queue, claim)
            if isinstance(candidate, ConfigError):
                impossible += 1
                queue.replace(claim, str(candidate))
                if impossible > MAX_IMPOSSIBLE:
                    report(
                        Event(
                            worker=name,
                            kind="fatal",
                            message=f"{impossible} candidates in a row were impossible: {candidate}",
                        )
                    )
                    return
                continue
            impossible = 0
            trial = candidate
        else:
            trial = planned[str(claim.hash)]
        if not _Attempt(job, queue, claim, trial, name, report, stopped).run():
            return


def _candidate(job: Job, queue: Queue, claim: Claim) -> PlannedTrial | ConfigError:
    study = job.plan.study
    try:
        chosen = settings(study, queue.suggest(claim))
        # One seed a candidate, in turn, so that no single seed decides what a search finds.
        seed = study.seeds[claim.trial.number % len(study.seeds)] if claim.seed is None else claim.seed
        trial = study.trial(chosen, seed=seed)
    except ConfigError as error:
        return error
    values: dict[str, Scalar] = factor_values(trial, factor_keys(study))
    label = label_of(study, {key: values[key] for key in chosen})
    candidate = PlannedTrial(arm=label, kind="search", seed=seed, trial=trial, factors=values)
    queue.note(claim, candidate)
    return candidate


class _Attempt:
    """One claimed trial, from its start to its record."""

    def __init__(
        self,
        job: Job,
        queue: Queue,
        claim: Claim,
        planned: PlannedTrial,
        worker: str,
        report: Report,
        stopped: Callable[[], bool],
    ) -> None:
        self.job, self.queue, self.claim, self.planned = job, queue, claim, planned
        self.worker, self.report, self.stopped = worker, report, stopped
        self.layout, self.hash = job.layout, planned.hash
        self.folder = self.layout.folder(self.hash)

    def run(self) -> bool:
        """Run it; False where this worker cannot go on."""
        if self.layout.record(self.hash).exists():
            # A search that sampled the same candidate again, or a record written just before a crash.
            record = load_record(self.layout.record(self.hash))
            self.queue.finish(self.claim, record)
            self._tell("finished", record=record)
            return True
        self._tell("started")
        tracked = self.job.tracker.open_trial(self.planned, self.layout) if self.job.tracker else None
        try:
            return self._tracked(tracked)
        finally:
            if tracked:
                tracked.close()

    def _tracked(self, tracked: TrialTracker | None) -> bool:
        try:
            with self.queue.heartbeat(self.claim):
                result = self._train(tracked)
            if result.status == "killed":
                self._stopped(tracked)
                return True
            self._finished(result, tracked)
        except ConfigError as error:
            self._failed(tracked, str(error), retry=False)
        except Exception as error:
            # The boundary of one trial: whatever went wrong inside it must not end the study.
            if disk_full(error):
                self._stop_for(tracked, f"no space left on the device: {error}")
                return False
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            self._failed(tracked, f"{type(error).__name__}: {error}", retry=True)
        return True

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

    def _finished(self, result: TrialResult, tracked: TrialTracker | None) -> None:
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
        self.queue.finish(self.claim, record)
        if tracked:
            tracked.finish(record, self.layout.tables_of(self.hash))
        if not self.planned.trial.train.keep_checkpoint:
            shutil.rmtree(self.folder, ignore_errors=True)
        for name in self.layout.side_tables(self.hash):  # copied beside the record; only weights stay
            (self.folder / name).unlink(missing_ok=True)
        self._tell("finished", record=record)

    def _stopped(self, tracked: TrialTracker | None) -> None:
        self.queue.fail(self.claim, "stopped when asked", retry=True, fresh=True)
        if tracked:
            tracked.abandon("killed", "stopped when asked; the next run of the study goes on from its checkpoint")
        self._tell("stopped")

    def _failed(self, tracked: TrialTracker | None, message: str, *, retry: bool) -> None:
        again = self.queue.fail(self.claim, message, retry=retry)
        if tracked:
            tracked.abandon("failed", message)
        self._tell("retried" if again else "failed", message=message)

    def _stop_for(self, tracked: TrialTracker | None, message: str) -> None:
        """The machine cannot go on: leave the trial for the next run of the study, as far as the full disk lets us."""
        # What cannot be written, the next run sees for itself: a trial that is RUNNING without a worker.
        with suppress(OSError, StorageInternalError):
            self.queue.fail(self.claim, message, retry=True, fresh=True)
        if tracked:
            with suppress(OSError):
                tracked.abandon("killed", message)
        self._tell("fatal", message=message)

    def _tell(
        self,
        kind: Literal["started", "stepped", "finished", "stopped", "retried", "failed", "fatal"],
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
                bpb=record.final.bpb if record else None,
                seconds=record.seconds if record else 0.0,
                status=record.status if record else "",
                message=message,
            )
        )


class _Watch:
    """The observer of one trial: tracking, pruning, progress and being asked to stop."""

    def __init__(self, attempt: _Attempt, tracked: TrialTracker | None) -> None:
        self.attempt, self.tracked = attempt, tracked
        self._told = 0.0

    def evaluated(self, evaluation: Evaluation) -> bool:
        """Track an evaluation; True where the study's pruner gives the trial up."""
        if self.tracked:
            self.tracked.evaluated(evaluation)
        attempt = self.attempt
        study, trial = attempt.job.plan.study, attempt.claim.trial
        if study.pruner is None:
            return False
        name = study.objectives[0]
        value = evaluation.bpb if name == "bpb" else evaluation.balance.get(name)
        if value is None or evaluation.step == 0:
            return False
        settings = attempt.planned.trial
        unit = study.trial({})
        per_evaluation = unit.train.eval_every * unit.train.batch_size * unit.model.context
        trial.report(value, max(1, round(evaluation.tokens / per_evaluation)))
        return evaluation.step < settings.train.steps and trial.should_prune()

    def stepped(self, step: int, total: int) -> bool:
        """Show progress, at most twice a second; True once the worker is asked to stop."""
        now = time.monotonic()
        if now - self._told > REPORT_SECONDS:
            self._told = now
            self.attempt._tell("stepped", step=step)
        return self.attempt.stopped()


class _Meter:
    """What a search has spent, from its records; other designs have no meter."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.limited = job.plan.study.design == "search" and bool(
            job.plan.study.budget.tokens or job.plan.study.budget.hours
        )
        self._seen: dict[str, tuple[int, float]] = {}

    def exhausted(self) -> bool:
        """Whether the tokens or hours (summed over trials) are used up."""
        if not self.limited:
            return False
        for name in self.job.layout.done() - set(self._seen):
            record = load_record(self.job.layout.record(name))
            ours = record.space == self.job.plan.space
            self._seen[name] = (record.final.tokens, record.seconds) if ours else (0, 0.0)
        budget = self.job.plan.study.budget
        tokens = sum(t for t, _ in self._seen.values())
        hours = sum(s for _, s in self._seen.values()) / 3600
        return bool((budget.tokens and tokens >= budget.tokens) or (budget.hours and hours >= budget.hours))


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.OperationalError) and "disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
