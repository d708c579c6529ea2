"""What a study does next: its plan as far as it is known, and the queue of that phase."""

from __future__ import annotations

from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.study.candidates import Candidates
from ablate.study.checkout import checkout_id
from ablate.study.designs import Plan, expand
from ablate.study.job import Job
from ablate.study.queue import Queue
from ablate.study.rates import traces
from ablate.study.records import save_plan
from ablate.study.storage import open_storage


def queue_of(job: Job) -> Queue:
    """Open the storage, and return the queue of a study's present phase; called by the parent and by each worker."""
    storage, checkout = open_storage(job.storage), checkout_id(job.root)
    if job.plan.racing:
        return Candidates(job.plan, storage, job.layout, checkout)
    return Queue(job.plan, storage, checkout)


def plan_of(plan: Plan, layout: Layout) -> Plan:
    """Return a study's plan grown by the learning rates that are known by now, written to plan.json."""
    known, tuned = traces(plan.study, layout)
    if plan.study.tune is not None:
        plan = expand(plan.study, known)
    before = load_plan(layout)
    # A search's file also says what its candidates were; it is written again when the race is over.
    if not (plan.racing and before and before.get("hash") == plan.hash):
        save_plan(layout, plan, tuned)
    return plan
