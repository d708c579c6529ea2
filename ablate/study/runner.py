"""`run_study`: plan, queue, workers, and going on after anything that can happen to them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError

from ablate.config import ConfigError, Study
from ablate.files import leftovers
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.results.record import Record, load_record
from ablate.study.address import default_storage, shown
from ablate.study.candidates import Candidates
from ablate.study.designs import Plan, expand
from ablate.study.engines import LocalEngine, host
from ablate.study.job import Event, Job, Run, disk_full
from ablate.study.kernels import compile_kernels
from ablate.study.outcome import Outcome
from ablate.study.progress import Display
from ablate.study.queue import Queue
from ablate.study.rates import traces
from ablate.study.records import save_plan
from ablate.study.storage import open_storage
from ablate.study.tracker import Tracker

# So many workers in a row that end without having touched a trial, and starting more of them is no use.
MAX_FALSE_STARTS = 3


class Engine(Protocol):
    """Where workers run; see engines.LocalEngine for what each method promises."""

    workers: int

    @property
    def threads(self) -> int: ...  # noqa: D102
    @property
    def alive(self) -> int: ...  # noqa: D102
    def ensure(self, job: Job, wanted: int) -> None: ...  # noqa: D102
    def poll(self, seconds: float) -> list[Event]: ...  # noqa: D102
    def reap(self) -> list[tuple[str, int]]: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102
    def kill(self) -> None: ...  # noqa: D102


def run_study(
    study: Study,
    root: Path,
    *,
    workers: int = 1,
    data_root: Path | None = None,
    storage: str | None = None,
    tracker: Tracker | None = None,
    engine: Engine | None = None,
    run: Run | None = None,
    display: Display | None = None,
) -> Outcome:
    """Run every trial of a study that has no result yet; safe to call again after any crash.

    Args:
        study: the study file.
        root: the project's root; results/, state/ and tables/ lie under it.
        workers: local processes; threads are divided among them.
        data_root: prepared corpora; root/data where not given.
        storage: Optuna's database URL; SQLite under root/state where not given.
        tracker: where runs are tracked (tracking.tracker.MlflowTracker); None tracks nothing.
        engine: where workers run; local processes where not given.
        run: what runs a trial; training.trial.run_trial where not given. It is pickled into workers.
        display: shows progress.

    Raises:
        ConfigError: before anything is trained: an invalid arm, a changed confirm plan, an unusable corpus, storage or
            tracking server, or a study that is running already.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}: at least 1 is needed")
    root = root.resolve()
    layout = Layout(root, study.name)
    engine = engine or LocalEngine(workers)
    expand(study)
    display = display or Display(study, engine.workers)
    with _alone(layout), _Signals() as signals, display:
        for partial in leftovers(layout.results):
            partial.unlink(missing_ok=True)
        card = None
        if run is None:
            with display.busy("preparing the corpus"):
                card = _data_card(study, data_root or root / "data")
            _set_aside(layout, card)
        job = Job(
            plan=_plan(study, layout),
            root=root,
            data_root=(data_root or root / "data").resolve(),
            storage=storage or default_storage(root),
            tracker=tracker,
            run=run,
            threads=engine.threads,
        )
        queue = _queue(job)
        queue.describe()
        display.say(f"Optuna: {shown(job.storage)}, study {job.plan.storage_name}")
        display.say(
            f"  optuna-dashboard {shown(job.storage)!r}   shows it while it runs (pip install optuna-dashboard)"
        )
        if tracker:
            with display.busy("opening MLflow"):
                tracker.start_study(job.plan, layout, card)
        if run is None and isinstance(engine, LocalEngine):
            done = layout.done()
            waiting = [t.trial for t in job.plan.trials if t.hash not in done]
            waiting += [study.trial({})] if job.plan.racing else []
            compile_kernels(waiting, root, display.say, lambda: signals.received is not None)
        outcome = _Session(job, engine, queue, signals, display).run()
        if tracker:
            status = "killed" if outcome.signal else "failed" if outcome.exit_code else "finished"
            tracker.end_study(job.plan, layout, status)
        return outcome


def _queue(job: Job) -> Queue:
    storage = open_storage(job.storage)
    return Candidates(job.plan, storage, job.layout) if job.plan.racing else Queue(job.plan, storage)


def _plan(study: Study, layout: Layout) -> Plan:
    """The plan as far as it is known, written to plan.json."""
    known, tuned = traces(study, layout)
    plan = expand(study, known)
    before = load_plan(layout)
    # A search's file also says what its candidates were; it is written again when the race is over.
    if not (plan.racing and before and before.get("hash") == plan.hash):
        save_plan(layout, plan, tuned)
    return plan


class _Session:
    """One run of a study, from its queue to the end of its last worker."""

    def __init__(self, job: Job, engine: Engine, queue: Queue, signals: _Signals, display: Display) -> None:
        self.job, self.engine, self.queue, self.signals = job, engine, queue, signals
        self.layout, self.display = job.layout, display
        self.failed: list[str] = []
        self.message = ""
        self._stopping = 0
        self._false_starts = 0

    def run(self) -> Outcome:
        try:
            while not self._ended():
                self.display.start(self.job.plan, self._done(), self.queue.known())
                if self.queue.reconcile(self.layout.done(), self._record, host()):
                    self._workers()
                if self._ended() or not self._next_phase():
                    break
        except (OSError, StorageInternalError) as error:
            if not disk_full(error):
                raise
            self.message = f"no space left on the device: {error}"
        finally:
            self._abandon()
        total = self.job.plan.total or self._done()
        return Outcome(self._done(), total, self.failed, self.signals.received, self.message)

    def _workers(self) -> None:
        """Keep workers running until no trial waits, however many of them die."""
        self.display.say(f"starting {min(self.engine.workers, self.queue.demand())} workers")
        self.engine.ensure(self.job, self.queue.demand())
        while self.engine.alive:
            for event in self.engine.poll(0.2):
                self._hear(event)
            for name, code in self.engine.reap():
                self._bury(name, code)
            if self._ended():
                self._stop()

    def _hear(self, event: Event) -> None:
        self.display.tell(event)
        if event.kind == "fatal":
            self.message = event.message
        elif event.kind == "failed":
            self.failed.append(f"{event.arm}, seed {event.seed}: {event.message}")
        elif event.kind == "finished":
            self._false_starts = 0

    def _bury(self, name: str, code: int) -> None:
        """A worker has ended: free what it was running and start another where trials wait."""
        rescued = self.queue.rescue(name)
        if code != 0 and not self._stopping:
            how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
            log = self.layout.state / "logs"
            goes_on = "; its trial goes on elsewhere" if any(retried for _, retried in rescued) else ""
            self.display.say(f"a worker {how}{goes_on} (log in {log})")
            self._false_starts += not rescued
        for trial, retried in rescued:
            if not retried and not self._stopping:
                self.failed.append(f"trial {trial}: its worker died three times")
        if self._false_starts >= MAX_FALSE_STARTS:
            self.message = f"workers end before they start a trial; see {self.layout.state / 'logs'}"
        if not self._ended() and (demand := self.queue.demand()):
            self.engine.ensure(self.job, demand)

    def _stop(self) -> None:
        """Ask the workers to end, once; a second signal ends them at once."""
        if self._stopping == 0:
            self._stopping = 1
            if self.signals.received:
                self.display.say("stopping: each worker finishes its step and saves (once more: at once)")
            self.engine.stop()
        elif self._stopping == 1 and self.signals.count > 1:
            self._stopping = 2
            self.engine.kill()

    def _abandon(self) -> None:
        """Whatever ends this process, no worker goes on without it."""
        if self.engine.alive:
            self.engine.kill()
        while self.engine.alive:
            self.engine.poll(0.1)
            self.engine.reap()

    def _next_phase(self) -> bool:
        """Whether there is more to do: trials whose learning rates, or finalists that are known now."""
        study, before = self.job.plan.study, len(self.job.plan.trials)
        if isinstance(self.queue, Candidates):
            plan = expand(study, finalists=self.queue.finalists())
            save_plan(self.layout, plan, search=self.queue.summary())
            if self.queue.exhausted:
                self.display.say(f"all {len(self.queue.board.arms())} candidates of the space have been tried")
            if plan.trials:
                self.display.say(f"racing is over; the best {study.finalists.count} run on fresh seeds")
        elif study.tune is not None:
            plan = _plan(study, self.layout)
        else:
            return False
        if len(plan.trials) == before:
            return False
        self.job = replace(self.job, plan=plan)
        self.queue = _queue(self.job)
        self.queue.describe()
        return True

    def _ended(self) -> bool:
        return self.signals.received is not None or bool(self.message)

    def _done(self) -> int:
        done = self.layout.done()
        plan = self.job.plan
        if plan.study.design != "search":
            return sum(t.hash in done for t in plan.trials)
        return sum(self._record(name).space == plan.space for name in done)

    def _record(self, trial: str) -> Record:
        return load_record(self.layout.record(trial))


def _data_card(study: Study, data_root: Path) -> dict[str, Any]:
    """Prepare the corpus and its questions once, before any worker needs them; raises ConfigError for what cannot be used."""
    from ablate.data.tokens import prepare

    base = study.trial({})
    prepared = prepare(base.corpus, data_root)
    if base.questions.tasks:
        from ablate.evaluation.evaluate import check_tasks
        from ablate.training.trial import TASKS

        check_tasks(base.questions, prepared, data_root / TASKS)
    return {**prepared.card, "data_hash": prepared.data_hash, "tokenizer_hash": prepared.tokenizer_hash}


def _set_aside(layout: Layout, card: dict[str, Any]) -> None:
    """Move results that were measured on other data out of the way: they cannot be compared with new ones."""
    plan = load_plan(layout)
    for name in sorted(layout.done()) if plan else []:
        record = load_record(layout.record(name))
        made = (record.provenance.data_hash, record.provenance.tokenizer_hash)
        if made != (card["data_hash"], card["tokenizer_hash"]):
            old = layout.state / "superseded" / layout.study / made[0]
            old.mkdir(parents=True, exist_ok=True)
            for path in (*layout.tables_of(name), layout.record(name)):
                path.replace(old / path.name)


@contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Hold the study's lock; raises ConfigError where another process on this machine runs it."""
    folder = layout.state / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / f"{layout.study}.lock"), folder / f"{layout.study}.pid"
    try:
        lock.acquire(blocking=False)
    except Timeout:
        pid = owner.read_text().strip() if owner.exists() else "?"
        raise ConfigError(
            f"study {layout.study!r} is running already, as process {pid}; wait for it or stop it"
        ) from None
    try:
        owner.write_text(f"{os.getpid()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


class _Signals:
    """SIGTERM and Ctrl-C are noted instead of ending this process; installed only where Python allows it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.count += 1
