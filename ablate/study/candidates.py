"""A search in the storage: one Optuna trial a candidate, whose value is its mean over the seeds that it got.

Workers decide one at a time what comes next (`storage.exclusive`), so that the budget is met exactly and no candidate is
made twice. Everything can be rebuilt from the records of the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from ablate.config import ConfigError, Scalar
from ablate.results.index import Finished
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.results.record import Record, load_record
from ablate.study.arms import factor_values
from ablate.study.designs import Plan, PlannedTrial
from ablate.study.queue import ARM, RUN, WORKER, Claim, Queue, directions
from ablate.study.race import means_of
from ablate.study.samplers import Proposal, adopt, key_of, propose
from ablate.study.scoreboard import Scoreboard, chosen_from, name_of, number_of
from ablate.study.space import Candidate, Chosen, Space
from ablate.study.storage import exclusive

NUMBER, ORIGIN, SETTINGS, RUNS, OUT, EXHAUSTED = "number", "origin", "settings", "runs", "out", "exhausted"
WARM = "warm_start"


@dataclass(slots=True)
class Entrant:
    """A candidate that this process, and no other, races now."""

    claim: Claim
    name: str
    candidate: Candidate


class Candidates(Queue):
    """The candidates of one search."""

    def __init__(self, plan: Plan, storage: RDBStorage, layout: Layout, checkout: str | None = None) -> None:
        super().__init__(plan, storage, checkout)
        self.layout = layout
        self.space = Space(plan.study)
        self.board = Scoreboard(plan, layout)

    def reconcile(self, done: set[str], load: Callable[[str], Record], host: str) -> int:
        """Free interrupted candidates, and bring back those that only the records know. Returns what `demand` does."""
        self.rescue_stale()
        known: set[str] = set()
        for frozen in self._trials():
            if frozen.state == TrialState.RUNNING:
                self._refuse_if_alive(frozen, host)
                self._fail(frozen._trial_id, "its process died", retry=True, fresh=True)
            known.add(str(frozen.user_attrs.get(ARM)))
        self.board.refresh()
        for arm, factors in self.board.arms().items():
            if arm not in known:
                self._bring_back(arm, factors)
        if self.plan.study.warm_start and self.study.user_attrs.get(WARM) != self.plan.study.warm_start:
            self._warm_start(self.plan.study.warm_start)
        return self.demand()

    @property
    def exhausted(self) -> bool:
        """Whether every candidate that the space has was tried."""
        return bool(self.study.user_attrs.get(EXHAUSTED))

    def demand(self) -> int:
        """Return how many more workers could race a candidate now."""
        waiting = super().demand()
        if self.exhausted:
            return waiting
        self.board.refresh()
        left = self._left()
        return waiting + (left if left is not None else 1_000_000)

    def open_trials(self) -> list[FrozenTrial]:
        """Return the candidates that wait; those that the budget cut off only while it has something left."""
        waiting = super().open_trials()
        if any(t.user_attrs.get(OUT) for t in waiting):
            self.board.refresh()
            if self._left() == 0:
                return [t for t in waiting if not t.user_attrs.get(OUT)]
        return waiting

    def known(self, finished: Iterable[Finished]) -> dict[str, dict[int, tuple[float, ...]]]:
        """Return the objectives' values of finished racing runs, by candidate and seed."""
        self.board.refresh()
        found: dict[str, dict[int, tuple[float, ...]]] = {}
        for run in self.board.runs.values():
            if run.values is not None:
                found.setdefault(run.arm, {})[run.seed] = run.values
        return found

    def next(self, worker: str) -> Entrant | None:
        """Take an interrupted candidate, or make a new one; None where the budget is used up or all has been tried."""
        with self._alone():
            claim = self.claim(worker)
            if claim is not None:
                return self._entrant(claim)
            self.board.refresh()
            if self._left() == 0:
                return None
            return self._new(worker)

    def reserve(self, entrant: Entrant, planned: PlannedTrial) -> bool:
        """Take one run of the budget for a candidate's next seed; False where none is left."""
        with self._alone():
            self.board.refresh()
            if planned.hash not in self._started() and self._left() == 0:
                return False
            runs = {**entrant.claim.trial.user_attrs.get(RUNS, {}), str(planned.seed): planned.hash}
            entrant.claim.trial.set_user_attr(RUNS, runs)
            return True

    def planned(self, entrant: Entrant, seed: int) -> PlannedTrial:
        """Return the run of a candidate at a seed."""
        return planned_run(self.space, entrant.name, entrant.candidate, seed, "search")

    def note(self, entrant: Entrant, record: Record) -> None:
        """Count a finished run, and link it from the candidate."""
        self.board.add(record)
        if record.run_id:
            runs = {**entrant.claim.trial.user_attrs.get(RUN, {}), str(record.seed): record.run_id}
            entrant.claim.trial.set_user_attr(RUN, runs)

    def pause(self, entrant: Entrant, out: str) -> None:
        """Put a candidate back in line that the budget cut off; a larger budget goes on with it first."""
        with self._alone():
            entrant.claim.trial.set_user_attr(OUT, out)
            self._set(entrant.claim.id, TrialState.WAITING, None)

    def close(self, entrant: Entrant, out: str | None, *, pruned: bool = False) -> None:
        """End a candidate's race with the mean over its seeds; `out` says why it did not get all of them."""
        if out:
            entrant.claim.trial.set_user_attr(OUT, out)
        scores = self.board.scores().get(entrant.name)
        if scores is None or pruned:
            # A single-objective sampler learns from a pruned trial; with several, Optuna knows no such state.
            state = TrialState.PRUNED if len(self.plan.study.objectives) == 1 else TrialState.FAIL
            self._set(entrant.claim.id, state, None)
            return
        means = means_of(scores.values())
        values = [goal.sign * mean for goal, mean in zip(self.plan.study.goals, means, strict=True)]
        self._set(entrant.claim.id, TrialState.COMPLETE, values)

    def finalists(self) -> list[PlannedTrial]:
        """Return the runs of the best candidates on fresh seeds, seed by seed."""
        study = self.plan.study
        self.board.refresh()
        arms = self.board.arms()
        best = {
            name: self.space.candidate(chosen_from(study, arms[name]))
            for name in self.board.best(study.finalists.count)
        }
        return [
            planned_run(self.space, name, candidate, seed, "finalist")
            for seed in study.finalist_seeds
            for name, candidate in best.items()
        ]

    def summary(self) -> dict[str, Any]:
        """Return what plan.json keeps of the search."""
        study = self.plan.study
        rows: dict[str, dict[str, Any]] = {}
        for frozen in self._trials():
            if frozen.user_attrs.get(ORIGIN) != WARM and ARM in frozen.user_attrs:
                attributes = frozen.user_attrs
                arm = str(attributes[ARM])
                out = attributes.get(OUT)
                waits = frozen.state == TrialState.WAITING and out is not None
                rows[arm] = {"arm": arm, "origin": attributes.get(ORIGIN), "out": out, "waits": waits}
        return {
            "sampler": study.sampler.name,
            "race_seeds": study.seeds,
            "finalist_seeds": study.finalist_seeds,
            "candidates": [rows[arm] for arm in sorted(rows, key=number_of)],
            "exhausted": self.exhausted,
            "left_out": list(self.space.notes),
            "held": []
            if "train.lr" in study.factors
            else [f"train.lr is {study.trial({}).train.lr:g} for every candidate"],
        }

    def _alone(self) -> AbstractContextManager[None]:
        return exclusive(self.storage, self.plan.storage_name, self.layout.state / "locks")

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _started(self) -> set[str]:
        """Return every run that the budget has been charged for."""
        reserved = {h for t in self._trials() for h in t.user_attrs.get(RUNS, {}).values()}
        return reserved | set(self.board.runs)

    def _left(self) -> int | None:
        """Return the runs that the budget has left for racing; None where it does not count runs and is not used up."""
        budget = self.plan.study.budget
        runs = self.board.runs.values()
        if budget.tokens and sum(run.tokens for run in runs) >= budget.tokens:
            return 0
        if budget.hours and sum(run.seconds for run in runs) >= budget.hours * 3600:
            return 0
        if budget.trials is None:
            return None
        return max(0, self.plan.study.racing_trials - len(self._started()))

    def _entrant(self, claim: Claim) -> Entrant:
        self.storage.record_heartbeat(claim.id)
        frozen = self.storage.get_trial(claim.id)
        if frozen.user_attrs.get(OUT):
            claim.trial.set_user_attr(OUT, None)
        return Entrant(claim, str(frozen.user_attrs[ARM]), self.space.candidate(frozen.params))

    def _new(self, worker: str) -> Entrant | None:
        trials = sorted(self._trials(), key=lambda t: int(t.user_attrs.get(NUMBER, 0)))
        numbers = [int(t.user_attrs.get(NUMBER, 0)) for t in trials]
        number = 1 + max([0, *numbers, *(number_of(run.arm) for run in self.board.runs.values())])
        tried = {key_of(t.params) for t in trials if t.user_attrs.get(ORIGIN) != WARM}
        history = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)]
        origin, proposal = self._next_proposal(history, number, tried)
        if proposal is None:
            self.study.set_user_attr(EXHAUSTED, True)
            return None
        candidate = self.space.candidate(proposal.chosen)
        first = planned_run(self.space, name_of(number), candidate, self.plan.study.seeds[0], "search")
        attributes = self._attributes(number, origin, candidate) | {WORKER: worker, RUNS: {str(first.seed): first.hash}}
        claim = self._claim_new(proposal, attributes)
        return Entrant(claim, name_of(number), candidate)

    def _next_proposal(
        self, history: Sequence[FrozenTrial], number: int, tried: set[str]
    ) -> tuple[str, Proposal | None]:
        study = self.plan.study
        for place, wanted in enumerate(study.enqueue):
            chosen = self.space.read(wanted, f"enqueue.{place}")
            if key_of(chosen) not in tried:
                return "enqueued", adopt(self.space, directions(study), history, number, chosen)
        return "sampled", propose(self.space, directions(study), history, number, tried)

    def _attributes(self, number: int, origin: str, candidate: Candidate) -> dict[str, Any]:
        return {ARM: name_of(number), NUMBER: number, ORIGIN: origin, SETTINGS: dict(candidate.changes)}

    def _claim_new(self, proposal: Proposal, attributes: dict[str, Any]) -> Claim:
        made = self._create(proposal.chosen, TrialState.RUNNING, attributes, proposal.system_attrs)
        number = self.storage.create_new_trial(self.study._study_id, template_trial=made)
        self.storage.record_heartbeat(number)
        return Claim(trial=optuna.Trial(self.study, number))

    def _create(
        self,
        chosen: Chosen,
        state: TrialState,
        attributes: dict[str, Any],
        system: Mapping[str, Any] | None = None,
        values: Sequence[float] | None = None,
    ) -> FrozenTrial:
        return optuna.trial.create_trial(
            state=state,
            values=values,
            params=chosen,
            distributions={key: self.space.distributions[key] for key in chosen},
            user_attrs=attributes,
            system_attrs=dict(system or {}),
        )

    def _bring_back(self, arm: str, factors: Mapping[str, Scalar]) -> None:
        """Put a candidate that only the records know back in line; the runs that it has are not trained again."""
        candidate = self.space.candidate(chosen_from(self.plan.study, factors))
        runs = {str(run.seed): name for name, run in self.board.runs.items() if run.arm == arm}
        attributes = self._attributes(number_of(arm), "sampled", candidate) | {RUNS: runs}
        self.study.add_trial(self._create(dict(candidate.chosen), TrialState.WAITING, attributes))

    def _warm_start(self, name: str) -> None:
        """Show the sampler what an earlier search of the same factors found; its candidates cost no budget here."""
        earlier = Layout(self.layout.root, name)
        plan = load_plan(earlier)
        if plan is None or plan["design"] != "search":
            raise ConfigError(f"warm_start is {name!r}: no search of that name has run here")
        if plan["objectives"] != list(self.plan.study.objectives):
            raise ConfigError(f"warm_start is {name!r}: its objectives are {', '.join(plan['objectives'])}")
        found: dict[str, list[tuple[Record, list[float]]]] = {}
        for trial in sorted(earlier.done()):
            record = load_record(earlier.record(trial))
            values = _values(self.plan, record)
            if record.kind == "search" and record.space == plan["space"] and values is not None:
                found.setdefault(record.arm, []).append((record, values))
        known = 0
        for arm, runs in sorted(found.items()):
            chosen = self._known(runs[0][0].factors)
            if chosen is None:
                continue
            known += 1
            means = means_of(values for _, values in runs)
            attributes = {ARM: f"{name}/{arm}", ORIGIN: WARM, SETTINGS: chosen}
            self.study.add_trial(self._create(chosen, TrialState.COMPLETE, attributes, values=means))
        if not known:
            raise ConfigError(f"warm_start is {name!r}: none of its candidates lies in this search's space")
        self.study.set_user_attr(WARM, name)

    def _known(self, factors: Mapping[str, Scalar]) -> Chosen | None:
        """Return an earlier candidate's levels, where this space has them."""
        try:
            return self.space.read(chosen_from(self.plan.study, factors), "warm_start")
        except (ConfigError, KeyError):
            return None


def planned_run(space: Space, name: str, candidate: Candidate, seed: int, kind: Any) -> PlannedTrial:
    """Return a candidate's training run at a seed."""
    trial = space.trial(candidate, seed)
    return PlannedTrial(arm=name, kind=kind, seed=seed, trial=trial, factors=factor_values(trial, space.columns))


def _values(plan: Plan, record: Record) -> list[float] | None:
    from ablate.study.queue import objective_values

    return objective_values(plan.study, record) if record.status == "finished" else None
