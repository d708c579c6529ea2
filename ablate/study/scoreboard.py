"""What a search's candidates have reached, read from their records; each record is read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ablate.config import Scalar, Study
from ablate.results.layout import Layout
from ablate.results.record import Record, load_record
from ablate.study.arms import exists, ordered_factors
from ablate.study.designs import Plan
from ablate.study.queue import objective_values
from ablate.study.race import Scores, ranked
from ablate.study.space import Chosen


@dataclass(frozen=True, slots=True)
class Run:
    """What one training run of a candidate counts for."""

    arm: str
    seed: int
    values: tuple[float, ...] | None
    """One number an objective; None where the run diverged or was pruned."""
    tokens: int
    seconds: float
    factors: Mapping[str, Scalar]


class Scoreboard:
    """Finished racing runs of one search, by trial."""

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        self.runs: dict[str, Run] = {}
        self._seen: set[str] = set()

    def refresh(self) -> None:
        """Read the records that were written since."""
        for name in sorted(self.layout.done() - self._seen):
            self._seen.add(name)
            self.add(load_record(self.layout.record(name)))

    def add(self, record: Record) -> None:
        """Count a record, where it is a racing run of this space."""
        if record.space != self.plan.space or record.kind != "search":
            return
        values = objective_values(self.plan.study, record) if record.status == "finished" else None
        self.runs[record.trial] = Run(
            arm=record.arm,
            seed=record.seed,
            values=None if values is None else tuple(values),
            tokens=record.final.tokens,
            seconds=record.seconds,
            factors=record.factors,
        )

    def scores(self, *, without: str = "") -> dict[str, Scores]:
        """Return each candidate's values by seed, lower is better; candidates of which a run diverged are left out."""
        lost = {run.arm for run in self.runs.values() if run.values is None}
        found: dict[str, dict[int, tuple[float, ...]]] = {}
        for run in self.runs.values():
            if run.arm not in lost | {without} and run.values is not None and run.seed in self.plan.study.seeds:
                values = tuple(goal.sign * value for goal, value in zip(self.plan.study.goals, run.values, strict=True))
                found.setdefault(run.arm, {})[run.seed] = values
        return dict(found)

    def best(self, count: int) -> list[str]:
        """Return the best candidates: those with the most seeds first, best of them first."""
        scores = self.scores()
        order: list[str] = []
        for seeds in sorted({len(s) for s in scores.values()}, reverse=True):
            order += ranked({name: s for name, s in scores.items() if len(s) == seeds})
        return order[:count]

    def arms(self) -> dict[str, Mapping[str, Scalar]]:
        """Return every candidate's settings, in the order of their names."""
        return {run.arm: run.factors for run in sorted(self.runs.values(), key=lambda run: number_of(run.arm))}


def name_of(number: int) -> str:
    """Return the short name of candidate `number`, from 1."""
    return f"c{number:03d}"


def number_of(name: str) -> int:
    """Return a candidate's number from its name."""
    return int(name[1:])


def chosen_from(study: Study, factors: Mapping[str, Scalar]) -> Chosen:
    """Return a candidate's levels from its recorded settings: only factors that exist beside the others."""
    chosen: Chosen = {}
    for key, factor in ordered_factors(study):
        if exists(factor, chosen):
            chosen[key] = factors[key]
    return chosen
