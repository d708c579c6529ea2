"""Racing: a candidate gets its next seed only while it may still be among the best.

Seeds are paired: every candidate is measured on the same ones, in the same order. After each seed a candidate is compared,
on the seeds that both have, with rivals that have all of them. The noise of one seed is estimated from those complete
rivals: what is left of their values after a candidate's mean and a seed's mean are taken out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Values of one candidate: seed to one number an objective, each turned so that lower is better.
Scores = Mapping[int, Sequence[float]]

# The noise must rest on at least this many degrees of freedom before anything is stopped for it.
MIN_DF = 4


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviation of one seed of one candidate, for each objective."""

    sd: tuple[float, ...]
    df: int


def noise_of(complete: Sequence[Scores], seeds: Sequence[int]) -> Noise | None:
    """Estimate the noise of a seed from candidates that have all `seeds`; None while there are too few of them."""
    df = (len(complete) - 1) * (len(seeds) - 1)
    if df < MIN_DF:
        return None
    table = np.array([[scores[seed] for seed in seeds] for scores in complete], dtype=float)
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean(axis=(0, 1))
    return Noise(tuple(np.sqrt((rest**2).sum(axis=(0, 1)) / df).tolist()), df)


def beaten_by(
    candidate: Scores, rivals: Mapping[str, Scores], seeds: Sequence[int], p: float, places: int
) -> tuple[str, ...]:
    """Return the rivals that a candidate loses to, where that rules it out; nothing where it goes on.

    With one objective, the candidate is ruled out once it is worse than the rival at place `places` (of those that
    have all seeds) by a one-sided test at level `p`. With several, once `places` rivals dominate it: each better in at
    least one objective by a test at level `p` over the number of objectives, and no worse on average in any other.

    Args:
        candidate: its values so far.
        rivals: values of the other candidates.
        seeds: all seeds of the race.
        p: level of the test; 0 rules nothing out.
        places: how many candidates the search names in the end.
    """
    complete = {name: scores for name, scores in rivals.items() if set(seeds) <= set(scores)}
    noise = noise_of(list(complete.values()), seeds)
    if p <= 0 or noise is None or len(complete) < places:
        return ()
    common = sorted(candidate)
    mine = np.mean([candidate[seed] for seed in common], axis=0)
    error = np.array(noise.sd) * np.sqrt(2 / len(common))
    from scipy import stats  # it takes a second to import, and most studies are no races

    bound = stats.t.isf(p / len(mine), noise.df) * error
    gaps = {name: mine - np.mean([scores[seed] for seed in common], axis=0) for name, scores in complete.items()}
    better = [name for name, gap in gaps.items() if np.all(gap >= 0) and np.any(gap > bound)]
    if len(better) < places:
        return ()
    return tuple(sorted(better, key=lambda name: float(np.sum(complete[name][common[0]])))[:places])


def ranked(candidates: Mapping[str, Scores]) -> list[str]:
    """Order candidates from best to worst by their means.

    With several objectives: fronts of non-dominated candidates one after the other, and within a front the ends first,
    then those with the most room around them (crowding distance of NSGA-II, doi 10.1109/4235.996017).
    """
    means = {name: np.mean(list(scores.values()), axis=0) for name, scores in candidates.items() if scores}
    left = sorted(means, key=lambda name: (tuple(means[name]), name))
    if left and len(means[left[0]]) == 1:
        return left
    order: list[str] = []
    while left:
        front = [a for a in left if not any(_dominates(means[b], means[a]) for b in left)]
        room = _crowding(front, means)
        order += sorted(front, key=room.__getitem__, reverse=True)
        left = [name for name in left if name not in front]
    return order


def _dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(a <= b) and np.any(a < b))


def _crowding(front: Sequence[str], means: Mapping[str, np.ndarray]) -> dict[str, float]:
    distance = dict.fromkeys(front, 0.0)
    for axis in range(len(means[front[0]])):
        line = sorted(front, key=lambda name: float(means[name][axis]))
        span = float(means[line[-1]][axis] - means[line[0]][axis]) or 1.0
        distance[line[0]] = distance[line[-1]] = np.inf
        for before, name, after in zip(line, line[1:], line[2:], strict=False):
            distance[name] += float(means[after][axis] - means[before][axis]) / span
    return distance
