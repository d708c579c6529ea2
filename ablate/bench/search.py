"""Racing against plain search on a planted landscape: regret and training runs, over many repetitions.

The landscape has a known optimum; its noise is that of the published `confirm` study. Candidates are proposed, raced and
ranked by the code that a real search uses; only the training run is replaced by the planted value and noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import optuna

from ablate.config import Scalar, Study, parse
from ablate.study.race import beaten_by, ranked
from ablate.study.samplers import key_of, propose
from ablate.study.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)

# Bits per byte in `confirm`: what one run of an arm differs by once arm and seed are taken out, and what a seed adds.
RUN_SD, SEED_SD = 0.025, 0.02
OFFSETS: dict[str, dict[Scalar, float]] = {
    "tree.activation": {"gelu": 0.0, "silu": 0.01, "relu": 0.03, "relu2": 0.05},
    "tree.init": {"uniform": 0.0, "orthogonal": 0.01, "zero_bias": 0.02, "median_split": 0.03},
}
FACTORS = {
    "tree.depth": {"range": {"low": 2, "high": 8}},
    "tree.mirror": {"range": {"low": -1, "high": 1}},
    "train.lr": {"range": {"low": 0.001, "high": 0.02, "log": True}},
    **{key: list(levels) for key, levels in OFFSETS.items()},
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to spend a budget."""

    name: str
    seeds: int
    """Racing seeds of a candidate."""
    race: float
    """Level of the race; 0 runs all seeds."""
    finalists: int
    """Candidates that run again on fresh seeds, as many as `fresh` each."""
    fresh: int = 0


RULES = (
    Rule("one seed, no finalists", 1, 0, 0),
    Rule("three seeds, no race, no finalists", 3, 0, 0),
    Rule("five seeds, no race, no finalists", 5, 0, 0),
    Rule("three seeds, no race, finalists", 3, 0, 3, 5),
    Rule("three seeds, race .1, finalists", 3, 0.1, 3, 5),
    Rule("three seeds, race .2, finalists", 3, 0.2, 3, 5),
    Rule("five seeds, race .1, finalists", 5, 0.1, 3, 5),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one repetition gave."""

    regret: float
    """Bits per byte of the named candidate above the optimum, without noise."""
    optimism: float
    """How much better the named candidate looked in the race than it is."""
    candidates: int
    runs: int


def planted(chosen: Mapping[str, Scalar]) -> float:
    """Return a candidate's true bits per byte above the optimum, which is at 0."""
    depth, mirror, rate = (float(chosen[key]) for key in ("tree.depth", "tree.mirror", "train.lr"))  # type: ignore[arg-type]
    # Deep trees want a smaller rate: the shape and the rate cannot be chosen one by one.
    best_rate = math.log(0.006) - 0.12 * (depth - 4)
    value = 0.004 * (depth - 4) ** 2 + 0.04 * (mirror - 0.4) ** 2 + 0.04 * (math.log(rate) - best_rate) ** 2
    return value + sum(levels[chosen[key]] for key, levels in OFFSETS.items())


def simulate(rule: Rule, budget: int, seed: int) -> Outcome:
    """Run one search of `budget` training runs on the planted landscape."""
    rng = np.random.default_rng([seed, 1])
    seeds = list(range(rule.seeds))
    settings = {"name": "planted", "design": "search", "factors": FACTORS, "budget": {"trials": 1000}, "seeds": seeds}
    space = Space(parse(Study, {**settings, "sampler": {"name": "tpe", "seed": seed}}))
    shared = rng.normal(0, SEED_SD, size=rule.seeds)
    chosen: dict[str, Mapping[str, Scalar]] = {}
    scores: dict[str, dict[int, tuple[float]]] = {}
    history: list[optuna.trial.FrozenTrial] = []
    left = budget - rule.finalists * rule.fresh
    while left:
        name = f"c{len(chosen):03d}"
        proposal = propose(space, ["minimize"], history, len(chosen) + 1, {key_of(c) for c in chosen.values()})
        assert proposal is not None
        chosen[name], scores[name] = proposal.chosen, {}
        for place in seeds:
            value = planted(proposal.chosen) + shared[place] + rng.normal(0, RUN_SD)
            scores[name][place] = (float(value),)
            left -= 1
            rivals = {other: s for other, s in scores.items() if other != name}
            if not left or beaten_by(scores[name], rivals, seeds, rule.race, max(1, rule.finalists)):
                break
        mean = float(np.mean([v[0] for v in scores[name].values()]))
        distributions = {key: space.distributions[key] for key in proposal.chosen}
        history.append(optuna.trial.create_trial(params=dict(proposal.chosen), distributions=distributions, value=mean))
    full = {name: s for name, s in scores.items() if len(s) == rule.seeds}
    order = ranked(full)
    named = order[0]
    if rule.finalists:
        fresh = {n: planted(chosen[n]) + rng.normal(0, RUN_SD, rule.fresh).mean() for n in order[: rule.finalists]}
        named = min(fresh, key=fresh.__getitem__)
    seen = float(np.mean([v[0] for v in scores[named].values()])) - float(shared.mean())
    true = planted(chosen[named])
    return Outcome(true, true - seen, len(chosen), budget)


def measure(rule: Rule, budget: int, repetitions: int) -> dict[str, float | str]:
    """Return a rule's mean regret with its 95% half width, its worst tenth, and what it spent, over repetitions."""
    found = [simulate(rule, budget, seed) for seed in range(repetitions)]
    regret = np.array([one.regret for one in found])
    return {
        "rule": rule.name,
        "regret": float(regret.mean()),
        "half_width": float(1.96 * regret.std(ddof=1) / math.sqrt(repetitions)),
        "worst_tenth": float(np.quantile(regret, 0.9)),
        "optimism": float(np.mean([one.optimism for one in found])),
        "candidates": float(np.mean([one.candidates for one in found])),
        "runs": float(budget),
    }
