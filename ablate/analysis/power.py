"""What a study of this size could have seen: minimum detectable effects, and how sure a probability of collapse is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from ablate.analysis.contrasts import ALPHA, Array

POWER = 0.8
MOST = 1000
"""Pairs beyond which no number is given."""
QUANTILES = 2000
"""Of the sample's sd, over which the power of equivalence is averaged."""


@cache
def detectable(n: int, *, paired: bool, alpha: float = ALPHA, power: float = POWER) -> float:
    """Effect, in standard deviations, that a two-sided t test of n pairs (or n runs a side) finds with this power.

    Paired, the unit is the sd of the differences; unpaired, the common sd of the runs. Solved on the noncentral t.
    """
    if n < 2:
        return float("nan")
    df = n - 1 if paired else 2 * n - 2
    root = np.sqrt(n) if paired else np.sqrt(n / 2)
    critical = stats.t.ppf(1 - alpha / 2, df)

    def missing(d: float) -> float:
        found = stats.nct.sf(critical, df, d * root) + stats.nct.cdf(-critical, df, d * root)
        # Far out in the tail SciPy's noncentral t gives NaN; the power there is 1.
        return (1.0 if np.isnan(found) else float(found)) - power

    return float(optimize.brentq(missing, 1e-6, 60.0))


@cache
def equivalence(n: int, margin: float, *, one_sided: bool = False, alpha: float = ALPHA) -> float:
    """Return the power of showing that n pairs of equal arms differ by less than the margin.

    `margin` is in standard deviations of the differences. Two one-sided t tests, each at alpha; with `one_sided` only the
    one that shows an arm to be no worse. The t of the test and its standard error share the sample's sd, so the power is
    averaged over that sd's distribution.
    """
    if n < 2:
        return float("nan")
    df = n - 1
    critical = stats.t.ppf(1 - alpha, df)
    share = (np.arange(QUANTILES) + 0.5) / QUANTILES
    sd = np.sqrt(stats.chi2.ppf(share, df) / df)
    room = margin * np.sqrt(n) - critical * sd
    inside = stats.norm.cdf(room) if one_sided else np.maximum(0.0, 2 * stats.norm.cdf(room) - 1)
    return float(inside.mean())


@cache
def seeds_to_show(margin: float, *, one_sided: bool = False, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Return the least number of pairs with which `equivalence` has this power; None over MOST."""
    return _least(lambda n: equivalence(n, margin, one_sided=one_sided, alpha=alpha) >= power)


@cache
def seeds_to_find(effect: float, power: float = POWER) -> int | None:
    """Return the least number of pairs that find an effect (in standard deviations) with this power; None over MOST."""
    return _least(lambda n: detectable(n, paired=True, power=power) <= effect)


def _least(enough: Callable[[int], bool]) -> int | None:
    """Return the least n from 2 to MOST that is enough, by halving: more pairs are never worse."""
    if not enough(MOST):
        return None
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def wilson(successes: ArrayLike, n: int, level: float = 0.95) -> tuple[Array, Array]:
    """Wilson's score interval of a proportion; (0, 1) where n is 0."""
    k = np.asarray(successes, dtype=float)
    if n == 0:
        return np.zeros_like(k), np.ones_like(k)
    z = float(stats.norm.ppf(0.5 + level / 2))
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = np.where(k == 0, 0.0, centre - half)
    high = np.where(k == n, 1.0, centre + half)
    return np.clip(low, 0, 1), np.clip(high, 0, 1)


def separation(values: ArrayLike, collapsed: ArrayLike) -> Array:
    """Ashman's D between collapsed and other runs [..., n]: over 2 the two are distinct modes; 0 where only one occurs.

    D = abs(mean difference) / sqrt((sd1^2 + sd2^2) / 2) (Ashman, Bird & Zepf 1994); a group of one has sd 0.
    """
    x, c = np.asarray(values, dtype=float), np.asarray(collapsed, dtype=bool)
    sizes = np.stack([c.sum(-1), (~c).sum(-1)])
    with np.errstate(divide="ignore", invalid="ignore"):
        means = [np.where(g, x, 0).sum(-1) / g.sum(-1) for g in (c, ~c)]
        variances = [
            np.where(g, (x - m[..., None]) ** 2, 0).sum(-1) / g.sum(-1) for g, m in zip((c, ~c), means, strict=True)
        ]
        d = np.abs(means[0] - means[1]) / np.sqrt((variances[0] + variances[1]) / 2)
    return np.where((sizes == 0).any(0), 0.0, d)


def brown_forsythe(groups: list[NDArray[np.float64]]) -> float | None:
    """P of equal spreads (Levene on medians, Brown & Forsythe 1974); None under two groups of three."""
    usable = [g for g in groups if len(g) >= 3]
    if len(usable) < 2 or all(np.ptp(g) == 0 for g in usable):
        return None
    return float(stats.levene(*usable, center="median").pvalue)
