"""The worker: claims trials and runs them, one by one, until none waits. Local processes and Ray tasks run this."""

from __future__ import annotations

import time
from collections.abc import Callable

from ablate.results.record import Record
from ablate.study.attempt import Attempt, Settle
from ablate.study.candidates import Candidates, Entrant
from ablate.study.job import Event, Job, Report
from ablate.study.phases import queue_of
from ablate.study.queue import Claim, Queue
from ablate.study.race import beaten_by
from ablate.study.rates import go_on

Stopped = Callable[[], bool]
# Between two looks of a worker that has nothing to run while learning rates are not settled.
IDLE_SECONDS = 0.5


def work(job: Job, name: str, report: Report, stopped: Stopped) -> None:
    """Run trials until none is left, `stopped` says so, or the machine cannot go on (a `fatal` event)."""
    queue = queue_of(job)
    if isinstance(queue, Candidates):
        _race(job, queue, name, report, stopped)
    else:
        _run_planned(job, queue, name, report, stopped)


def _run_planned(job: Job, queue: Queue, name: str, report: Report, stopped: Stopped) -> None:
    plan, seen = job.plan, set[str]()
    planned = {t.hash: t for t in plan.trials}
    while not stopped():
        claim = queue.claim(name)
        if claim is None and not plan.waiting_for_tune:
            return
        if claim is None:
            others, done = queue.running(), job.layout.done()
            if done == seen:
                if not others:
                    return
                time.sleep(IDLE_SECONDS)  # what others run may settle a learning rate
                continue
            seen = done
        if claim is None or claim.hash not in planned:
            plan = go_on(queue, job.layout)
            planned = {t.hash: t for t in plan.trials}
            report(Event(worker=name, kind="planned", total=plan.total))
        if claim is not None:
            settle = _Planned(queue, claim)
            if not Attempt(job, planned[str(claim.hash)], name, report, stopped, settle).run().goes_on:
                return


class _Planned(Settle):
    """A planned trial's entry in the queue."""

    def __init__(self, queue: Queue, claim: Claim) -> None:
        self.heartbeat, self.trial = queue.heartbeat(claim), claim.trial
        self._queue, self._claim = queue, claim

    def finish(self, record: Record) -> None:
        self._queue.finish(self._claim, record)

    def fail(self, message: str, *, retry: bool, fresh: bool = False) -> bool:
        return self._queue.fail(self._claim, message, retry=retry, fresh=fresh)


def _race(job: Job, queue: Candidates, name: str, report: Report, stopped: Stopped) -> None:
    while not stopped():
        entrant = queue.next(name)
        if entrant is None or not _run_candidate(job, queue, entrant, name, report, stopped):
            return


def _run_candidate(job: Job, queue: Candidates, entrant: Entrant, name: str, report: Report, stopped: Stopped) -> bool:
    """Run a candidate seed by seed, until it is beaten or has all of them; False where this worker cannot go on."""
    study = job.plan.study
    out: str | None = None
    for place, seed in enumerate(study.seeds):
        planned = queue.planned(entrant, seed)
        if place and not queue.reserve(entrant, planned):
            queue.pause(entrant, f"the budget was used up after {place} of {len(study.seeds)} seeds")
            return True
        ended = Attempt(job, planned, name, report, stopped, _Raced(queue, entrant, first=place == 0)).run()
        if ended.record is None:
            return ended.goes_on
        if ended.record.status != "finished":
            out = f"{ended.record.status} at seed {seed}"
            break
        queue.board.refresh()
        scores = queue.board.scores()
        mine = scores.pop(entrant.name, None)
        if mine is None:  # a layer without trees has no balance
            out = f"has no value for {' and '.join(study.objectives)}"
            break
        places = max(1, study.finalists.count)
        winners = beaten_by(mine, scores, study.seeds, study.race, places)
        if winners and place + 1 < len(study.seeds):
            out = f"worse than {', '.join(winners)} after {place + 1} of {len(study.seeds)} seeds"
            break
    queue.close(entrant, out, pruned=out is not None and out.startswith("pruned"))
    return True


class _Raced(Settle):
    """A candidate's entry: it stays open over its seeds, and is given up as a whole. Only its first run can be pruned."""

    def __init__(self, queue: Candidates, entrant: Entrant, *, first: bool) -> None:
        self.heartbeat, self.trial = queue.heartbeat(entrant.claim), entrant.claim.trial if first else None
        self._queue, self._entrant = queue, entrant

    def finish(self, record: Record) -> None:
        self._queue.note(self._entrant, record)

    def fail(self, message: str, *, retry: bool, fresh: bool = False) -> bool:
        return self._queue.fail(self._entrant.claim, message, retry=retry, fresh=fresh)
