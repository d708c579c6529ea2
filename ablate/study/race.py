"""Racing: a candidate gets its next seed only while it may still be among the best.

Seeds are paired: every candidate is measured on the same ones, in the same order. After each seed a candidate is compared,
on the seeds that both have, with rivals that have all of them. The noise of one seed is estimated from those complete
rivals: what is left of their values after a candidate's mean and a seed's mean are taken out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

# Values of one candidate: seed to one number an objective, each turned so that lower is better.
Scores = Mapping[int, Sequence[float]]

# Sums are exact below (`fmean`), whatever the order in which runs came in: candidates may tie in one objective, and the
# last bit would then decide which of them dominates.

# The noise must rest on at least this many degrees of freedom before anything is stopped for it.
MIN_DF = 4


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviation of one seed of one candidate, for each objective."""

    sd: tuple[float, ...]
    df: int


def means_of(scores: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Return the mean of each objective over runs; the same in whatever order the runs are."""
    return tuple(fmean(values) for values in zip(*scores, strict=True))


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
    complete = {name: rivals[name] for name in sorted(rivals) if set(seeds) <= set(rivals[name])}
    noise = noise_of(list(complete.values()), seeds)
    if p <= 0 or noise is None or len(complete) < places:
        return ()
    common = sorted(candidate)
    mine = np.array(means_of(candidate[seed] for seed in common))
    error = np.array(noise.sd) * np.sqrt(2 / len(common))
    from scipy import stats  # it takes a second to import, and most studies are no races

    bound = stats.t.isf(p / len(mine), noise.df) * error
    gaps = {name: mine - means_of(scores[seed] for seed in common) for name, scores in complete.items()}
    better = [name for name, gap in gaps.items() if np.all(gap >= 0) and np.any(gap > bound)]
    if len(better) < places:
        return ()
    return tuple(sorted(better, key=lambda name: float(np.sum(complete[name][common[0]])))[:places])


def ranked(candidates: Mapping[str, Scores]) -> list[str]:
    """Order candidates from best to worst by their means.

    With several objectives: fronts of non-dominated candidates one after the other, and within a front the ends first,
    then those with the most room around them (crowding distance of NSGA-II, doi 10.1109/4235.996017).
    """
    means = {name: means_of(scores.values()) for name, scores in candidates.items() if scores}
    left = sorted(means, key=lambda name: (means[name], name))
    if left and len(means[left[0]]) == 1:
        return left
    order: list[str] = []
    while left:
        front = [a for a in left if not any(_dominates(means[b], means[a]) for b in left)]
        room = _crowding(front, means)
        order += sorted(front, key=room.__getitem__, reverse=True)
        left = [name for name in left if name not in front]
    return order


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


def _crowding(front: Sequence[str], means: Mapping[str, Sequence[float]]) -> dict[str, float]:
    distance = dict.fromkeys(front, 0.0)
    for axis in range(len(means[front[0]])):
        line = sorted(front, key=lambda name: means[name][axis])
        span = means[line[-1]][axis] - means[line[0]][axis] or 1.0
        distance[line[0]] = distance[line[-1]] = np.inf
        for before, name, after in zip(line, line[1:], line[2:], strict=False):
            distance[name] += (means[after][axis] - means[before][axis]) / span
    return distance
