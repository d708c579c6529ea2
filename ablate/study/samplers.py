"""Optuna's samplers, asked in a copy of the study in memory, so that the stored study gets only candidates that can exist.

What a sampler proposes depends on the finished candidates, its seed and the candidate's number alone: a search that was
killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

from ablate.config import ConfigError, Sampler, Scalar, Study
from ablate.config.endpoints import Direction
from ablate.study.space import Chosen, Space

# A sampler that keeps proposing what cannot exist, or what was tried, is answered with the nearest that can.
ATTEMPTS = 20
NEARBY = 64
TRIES = 4_000


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a sampler wants to try next."""

    chosen: Chosen
    system_attrs: Mapping[str, Any] = field(default_factory=dict)
    """What the sampler keeps with the trial for its next proposals (the state of CMA-ES, the generation of NSGA-II)."""


def check(study: Study, space: Space) -> None:
    """Refuse a sampler that cannot search this space; raises ConfigError."""
    name = study.sampler.name
    ranges = [key for key, d in space.distributions.items() if not isinstance(d, CategoricalDistribution)]
    if name == "cmaes" and len(study.objectives) > 1:
        raise ConfigError(
            f"sampler is 'cmaes': it takes one objective, not {len(study.objectives)}; use tpe, gp or nsga2"
        )
    if name == "cmaes" and len(ranges) < 2:
        raise ConfigError(
            f"sampler is 'cmaes': it needs at least two factors with a range; this search has {len(ranges)}"
        )


def make(settings: Sampler, number: int) -> BaseSampler:
    """Build Optuna's sampler for the proposal of candidate `number`."""
    seed = zlib.crc32(f"{settings.seed} {number}".encode())
    startup: dict[str, Any] = {} if settings.startup is None else {"n_startup_trials": settings.startup}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match settings.name:
            case "tpe":
                more: dict[str, Any] = {"multivariate": True, "group": True} if settings.multivariate else {}
                return TPESampler(seed=seed, **startup, **more)
            case "cmaes":
                return CmaEsSampler(seed=seed, popsize=settings.population, warn_independent_sampling=False, **startup)
            case "gp":
                return GPSampler(seed=seed, warn_independent_sampling=False, **startup)
            case "nsga2":
                population: dict[str, Any] = (
                    {} if settings.population is None else {"population_size": settings.population}
                )
                return NSGAIISampler(seed=seed, **population)
            case "qmc":
                # One sequence for the whole search; a candidate's number is its place in it.
                return _Sequence(settings.seed, number, RandomSampler(seed=seed))
            case "random":
                return RandomSampler(seed=seed)


def propose(
    space: Space,
    directions: Sequence[Direction],
    history: Sequence[FrozenTrial],
    number: int,
    tried: Collection[str],
) -> Proposal | None:
    """Ask the study's sampler for the next candidate.

    Args:
        space: the search's space.
        directions: `minimize` or `maximize` for each objective.
        history: earlier candidates in their order: complete, pruned, and running ones.
        number: the new candidate's number, from 0.
        tried: keys (`key_of`) of candidates that exist already; none is proposed twice.

    Returns:
        The candidate, or None where every combination has been tried.
    """
    scratch = _copy(space.study.sampler, directions, history, number)
    rng = np.random.default_rng([space.study.sampler.seed, number])
    first: Chosen | None = None
    for _ in range(ATTEMPTS):
        trial = scratch.ask()
        chosen = space.suggest(trial)
        if space.impossible(chosen) is None and key_of(chosen) not in tried:
            return Proposal(chosen, scratch.trials[trial.number].system_attrs)
        first = first or chosen
        scratch.tell(trial, state=TrialState.FAIL)
    assert first is not None
    wanted = first
    fresh = [c for c in space.possible(rng, NEARBY, TRIES) if key_of(c) not in tried]
    if not fresh:
        fresh = [c for c in space.possible(rng, TRIES, TRIES) if key_of(c) not in tried]
    return Proposal(min(fresh, key=lambda c: space.distance(c, wanted))) if fresh else None


def adopt(
    space: Space, directions: Sequence[Direction], history: Sequence[FrozenTrial], number: int, chosen: Chosen
) -> Proposal:
    """Let the sampler take note of a candidate that a user chose, as Optuna does with enqueued trials."""
    scratch = _copy(space.study.sampler, directions, history, number)
    scratch.enqueue_trial(chosen)
    trial = scratch.ask()
    space.suggest(trial)
    kept = {k: v for k, v in scratch.trials[trial.number].system_attrs.items() if k != "fixed_params"}
    return Proposal(chosen, kept)


def key_of(chosen: Mapping[str, Scalar]) -> str:
    """Return a combination as text that is equal for equal combinations."""
    numbers = {key: float(v) for key, v in chosen.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return json.dumps({**chosen, **numbers}, sort_keys=True)


def _copy(
    settings: Sampler, directions: Sequence[Direction], history: Sequence[FrozenTrial], number: int
) -> optuna.Study:
    scratch = optuna.create_study(directions=list(directions), sampler=make(settings, number))
    for trial in history:
        scratch.add_trial(trial)
    return scratch


class _Sequence(QMCSampler):
    """A scrambled Sobol sequence that begins at a given place; Optuna's counts its place in the study's attributes."""

    def __init__(self, seed: int, place: int, independent: BaseSampler) -> None:
        super().__init__(
            seed=seed,
            scramble=True,
            independent_sampler=independent,
            warn_asynchronous_seeding=False,
            warn_independent_sampling=False,
        )
        self._place = place

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._place + super()._find_sample_id(study, search_space)
