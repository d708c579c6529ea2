"""Which arm leads on each objective, by its mean over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from ablate.config.endpoints import endpoints


@dataclass(frozen=True, slots=True)
class Leader:
    """The best arm on one objective."""

    objective: str
    arm: str
    value: float
    """Mean over its seeds."""
    seeds: int

    def __str__(self) -> str:
        return f"{self.objective} {self.value:.4f} ({self.arm}, {self.seeds} {'seed' if self.seeds == 1 else 'seeds'})"


def leaders(objectives: Sequence[str], values: Mapping[str, Mapping[int, Sequence[float]]]) -> list[Leader]:
    """Return the leader on each objective, among the arms that have as many seeds as any other.

    Args:
        objectives: names, in the order of the numbers in `values`.
        values: arm to seed to one number an objective.
    """
    most = max((len(seeds) for seeds in values.values()), default=0)
    full = {arm: seeds for arm, seeds in values.items() if most and len(seeds) == most}
    found = []
    for place, goal in enumerate(endpoints(list(objectives))):
        means = {arm: mean(numbers[place] for numbers in seeds.values()) for arm, seeds in sorted(full.items())}
        if means:
            choose = min if goal.better == "lower" else max
            arm = choose(means, key=means.__getitem__)
            found.append(Leader(goal.name, arm, means[arm], most))
    return found
