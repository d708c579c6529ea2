"""Each arm's learning rate, worked out from the records of its tuning trials: a kill loses nothing."""

from __future__ import annotations

from typing import Any

from ablate.config import Study
from ablate.config.tune import Trace, Values, follow
from ablate.results.layout import Layout
from ablate.results.record import load_record
from ablate.study.arms import Arm, factor_keys
from ablate.study.designs import Plan, expand, tuning_trial
from ablate.study.queue import Queue
from ablate.study.records import save_plan
from ablate.study.storage import exclusive


def traces(study: Study, layout: Layout) -> tuple[dict[str, Trace], dict[str, Any]]:
    """Return how far the tuning of every arm is, and for plan.json how each known rate was chosen."""
    if study.tune is None:
        return {}, {}
    done, keys, base = layout.done(), factor_keys(study), study.trial({}).train.lr
    found, tuned = {}, {}
    for arm in expand(study).arms:
        values = _Measured(study, layout, done, keys, arm)
        trace = found[arm.label] = follow(study.tune, base, study.quality, values)
        if trace.chosen is not None:
            tuned[arm.label] = {
                "lr": trace.chosen,
                "at_edge": trace.bound,
                "tried": [
                    {"lr": lr, study.quality.name: values(lr), "round": place} for lr, place in trace.rounds.items()
                ],
            }
    return found, tuned


def go_on(queue: Queue, layout: Layout) -> Plan:
    """Put in line what the results of tuning trials ask for: further rates, and the evaluation of arms that have theirs.

    Workers call it one at a time when they run out of trials, so that none of them has to wait for all the others.
    """
    study = queue.plan.study
    with exclusive(queue.storage, queue.plan.storage_name, layout.state / "locks"):
        known, tuned = traces(study, layout)
        plan = expand(study, known)
        if queue.add(plan):
            save_plan(layout, plan, tuned)
    return plan


class _Measured:
    """Quality of an arm at a rate on each tuning seed, each record read once."""

    def __init__(self, study: Study, layout: Layout, done: set[str], keys: list[str], arm: Arm) -> None:
        self.study, self.layout, self.done, self.keys, self.arm = study, layout, done, keys, arm
        self._known: dict[float, Values | None] = {}

    def __call__(self, rate: float) -> Values | None:
        if rate not in self._known:
            self._known[rate] = self._read(rate)
        return self._known[rate]

    def _read(self, rate: float) -> Values | None:
        assert self.study.tune is not None
        names = [tuning_trial(self.study, self.arm, s, rate, self.keys).hash for s in self.study.tune.seeds]
        if not self.done.issuperset(names):
            return None
        records = [load_record(self.layout.record(name)) for name in names]
        return [self.study.quality.value(r.final) if r.status == "finished" else None for r in records]
