"""One run of a study, from its queue to the end of its last worker."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from typing import Protocol

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from ablate.config import masked
from ablate.files import described, machine_fault
from ablate.results.index import index
from ablate.results.record import Record, load_record
from ablate.study.candidates import Candidates
from ablate.study.designs import expand
from ablate.study.engines import host
from ablate.study.job import Event, Job
from ablate.study.oom import oom_kills
from ablate.study.phases import plan_of, queue_of
from ablate.study.progress import Display
from ablate.study.queue import Queue
from ablate.study.records import save_plan
from ablate.study.stopping import SECONDS, TRAINING_SECONDS, Stops

# So many workers in a row that end without having touched a trial, and starting more of them is no use.
MAX_FALSE_STARTS = 3
# Seconds that workers get to end by themselves, of those that the whole command has.
SHARE = 0.7


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


class Session:
    """One run of a study, from its queue to the end of its last worker."""

    def __init__(self, job: Job, engine: Engine, queue: Queue, stops: Stops, display: Display) -> None:
        self.job, self.engine, self.queue, self.stops = job, engine, queue, stops
        self.layout, self.display = job.layout, display
        self.failed: list[str] = []
        self.message = ""
        self._stopping, self._until = 0, 0.0
        self._running: set[str] = set()
        self._started = 0
        self._false_starts = 0
        self._oom_kills = oom_kills()

    def run(self) -> None:
        """Run phase after phase, until all is done, a signal came, or the machine cannot go on."""
        try:
            while not self._ended():
                self.display.start(self.job.plan, self.done(), self.queue.known(index(self.layout)))
                if self.queue.reconcile(self.layout.done(), self._record, host()):
                    self._workers()
                if self._ended() or not self._next_phase():
                    break
        except (OSError, MemoryError, StorageInternalError, SQLAlchemyError) as error:
            # A bug is none of the machine's; it is shown as one.
            if not machine_fault(error) and not isinstance(error, StorageInternalError | SQLAlchemyError):
                raise
            self.message = f"this machine could not go on: {masked(described(error))}; run the study again"
        finally:
            self._abandon()

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
            else:
                self.queue.fill(self._started)

    def _hear(self, event: Event) -> None:
        self.display.tell(event)
        self._started += event.kind == "started"
        if event.kind in {"started", "stepped"}:
            self._running.add(event.worker)
        else:
            self._running.discard(event.worker)
        if event.kind == "fatal":
            self.message = self.message or event.message  # of several workers the first
        elif event.kind == "failed":
            self.failed.append(f"{event.arm}, seed {event.seed}: {event.message}")
        elif event.kind == "finished":
            self._false_starts = 0

    def _bury(self, name: str, code: int) -> None:
        """A worker has ended: free what it was running and start another where trials wait."""
        self._running.discard(name)
        starved = self._starved(code)
        rescued = self.queue.rescue(name, fresh=starved or self._ended())
        if code != 0 and not self._stopping:
            how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
            how = "was killed by the kernel, for memory ran out" if starved else how
            log = self.layout.state / "logs"
            goes_on = "; its trial goes on elsewhere" if any(retried for _, retried in rescued) else ""
            self.display.say(f"a worker {how}{goes_on} (log in {log})")
            self._false_starts += not rescued and not starved
        if starved:
            self._make_room([trial for trial, _ in rescued])
        for trial, retried in rescued:
            if not retried and not self._stopping:
                self.failed.append(f"trial {trial}: its worker died three times")
        if self._false_starts >= MAX_FALSE_STARTS:
            self.message = f"workers end before they start a trial; see {self.layout.state / 'logs'}"
        if not self._ended() and (demand := self.queue.demand()):
            self.engine.ensure(self.job, demand)

    def _starved(self, code: int) -> bool:
        """Whether a worker that ended with this code was ended by the kernel, as memory ran out."""
        if code != -signal.SIGKILL or self._stopping or oom_kills() <= self._oom_kills:
            return False
        self._oom_kills += 1
        return True

    def _make_room(self, trials: list[str]) -> None:
        """Memory ran out: go on with a worker less, or where there is one only, end this run; no trial is lost by it."""
        if self.engine.workers > 1:
            self.engine.workers -= 1
            self.display.say(f"going on with {self.engine.workers} workers, for which there may be room")
        else:
            what = f" at trial {trials[0]}" if trials else ""
            self.message = (
                f"this machine could not go on: out of memory{what}, with one worker; free some or make it smaller, and "
                "run the study again"
            )

    def _stop(self) -> None:
        """Ask the workers to end, once; those that have not in time are ended, at a second signal at once."""
        now = time.monotonic()
        if self._stopping == 0:
            seconds = TRAINING_SECONDS if self._running else SECONDS
            if self.stops.received:
                self.stops.seconds = seconds
                self.display.say("stopping: each worker finishes its step and saves (once more: at once)")
            self._stopping, self._until = 1, now + seconds * SHARE
            self.engine.stop()
        elif self._stopping == 1 and now > self._until:
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
            plan = plan_of(self.job.plan, self.layout)
        else:
            return False
        if len(plan.trials) == before:
            return False
        self.job = replace(self.job, plan=plan)
        self.queue = queue_of(self.job)
        self.queue.describe()
        return True

    def _ended(self) -> bool:
        return self.stops.received is not None or bool(self.message)

    def done(self) -> int:
        """Return how many trials of the plan have a result."""
        done, plan = self.layout.done(), self.job.plan
        if plan.study.design == "search":
            return sum(one.space == plan.space for one in index(self.layout))
        return sum(t.hash in done for t in plan.trials)

    def _record(self, trial: str) -> Record:
        return load_record(self.layout.record(trial))
