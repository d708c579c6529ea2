"""Comparisons of two arms: standard tests over a last axis of seeds, and the three verdicts.

Every function takes arrays whose last axis holds the seeds (or, for the adjustments, the tests of one family), so
that one call
serves a single study and five thousand simulated ones. Seeds are the unit: nothing here ever sees tokens or layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
Claim = Literal["lower", "higher", "matches", "differs"]
ALPHA = 0.05
_EXACT = 16  # sign-flip enumerates up to 2^16 patterns; above that it samples
_PATTERNS = 4096  # sign patterns in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A mean difference with its t interval; every field has the shape of the input without its last axis."""

    effect: Array
    se: Array
    df: Array
    low: Array
    high: Array
    p: Array
    """Two-sided, of no difference."""
    sd: Array
    """Of the paired differences, or the pooled one where unpaired."""


def _estimate(effect: Array, se: Array, df: Array, sd: Array, level: float) -> Estimate:
    flat = se == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(flat, np.where(effect == 0, 0.0, np.inf), np.abs(effect) / se)
    half = np.where(flat, 0.0, stats.t.ppf(0.5 + level / 2, df) * se)
    p = np.where(flat & (effect != 0), 0.0, 2 * stats.t.sf(t, df))
    return Estimate(effect, se, df, effect - half, effect + half, p, sd)


def paired(difference: ArrayLike, level: float = 0.95) -> Estimate:
    """Paired t: mean of the differences [..., n], n >= 2. Identical differences give an interval of width zero."""
    d = np.asarray(difference, dtype=float)
    n = d.shape[-1]
    if n < 2:
        raise ValueError(f"paired t needs at least 2 pairs, not {n}")
    sd = d.std(axis=-1, ddof=1)
    # A spread at rounding level is none: equal differences must not look like a real, tiny variance.
    sd = np.where(sd <= 1e-12 * np.abs(d).max(axis=-1), 0.0, sd)
    return _estimate(d.mean(axis=-1), sd / np.sqrt(n), np.full(d.shape[:-1], n - 1.0), sd, level)


def welch(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Welch's t for mean(a) - mean(b): a [..., n], b [..., m], unpaired, unequal variances (Welch 1947)."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n, m = x.shape[-1], y.shape[-1]
    if min(n, m) < 2:
        raise ValueError(f"Welch's t needs at least 2 runs a side, not {n} and {m}")
    va, vb = x.var(axis=-1, ddof=1) / n, y.var(axis=-1, ddof=1) / m
    se = np.sqrt(va + vb)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.where(se == 0, n + m - 2.0, (va + vb) ** 2 / (va**2 / (n - 1) + vb**2 / (m - 1)))
    sd = np.sqrt((va * n + vb * m) / 2)
    return _estimate(x.mean(axis=-1) - y.mean(axis=-1), se, df, sd, level)


def ratio(
    numerator: ArrayLike, denominator: ArrayLike, level: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """mean(a) / mean(b) of paired a, b [n], n >= 2, with Fieller's interval: all q with mean(a - q b) within its t interval
    of 0. The interval is None where mean(b) is itself not apart from 0, so that q is not bounded.
    """
    a, b = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    n = len(a)
    if n < 2 or n != len(b):
        raise ValueError(f"a ratio of means needs at least 2 pairs, not {n} and {len(b)}")
    covariance = np.cov(a, b) / n
    t2 = stats.t.ppf(0.5 + level / 2, n - 1) ** 2
    x, y = a.mean(), b.mean()
    # mean(a - q b)² <= t² var(mean(a - q b)) is second, first, zeroth: a quadratic in q.
    second = y**2 - t2 * covariance[1, 1]
    first = x * y - t2 * covariance[0, 1]
    zeroth = x**2 - t2 * covariance[0, 0]
    value = float(x / y) if y else float("nan")
    if second <= 0:
        return value, None
    half = np.sqrt(max(0.0, first**2 - second * zeroth))
    return value, (float((first - half) / second), float((first + half) / second))


def within(e: Estimate, margin: ArrayLike) -> Array:
    """TOST: p of abs(effect) >= margin, small where the two are equivalent (Schuirmann 1987)."""
    m = np.asarray(margin, dtype=float)
    return _one_sided(m - np.abs(e.effect), e)


def under(e: Estimate, bound: ArrayLike) -> Array:
    """One-sided p of effect >= bound, small where it is shown to lie under the bound."""
    return _one_sided(np.asarray(bound, dtype=float) - e.effect, e)


def beyond(e: Estimate, margin: ArrayLike) -> Array:
    """P of abs(effect) <= margin, small where they differ by more; doubled, as the side is taken from the data."""
    m = np.asarray(margin, dtype=float)
    return np.minimum(1.0, 2 * _one_sided(np.abs(e.effect) - m, e))


def _one_sided(distance: Array, e: Estimate) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        p = stats.t.sf(distance / e.se, e.df)
    return np.where(e.se == 0, np.where(distance > 0, 0.0, 1.0), p)


def sign_flip(difference: ArrayLike, rng: np.random.Generator, draws: int = 9_999) -> Array:
    """Two-sided sign-flip p of the mean difference [..., n]: exact up to n = 16, sampled (with the +1 correction)
    above.
    """
    d = np.asarray(difference, dtype=float)
    n = d.shape[-1]
    exact = n <= _EXACT
    patterns = 2 ** (n - 1) if exact else draws  # the other half of the exact ones mirrors this one
    observed = np.abs(d.sum(axis=-1))
    slack = 1e-9 * np.abs(d).sum(axis=-1)  # sums that are equal but for rounding count as ties
    count = np.zeros(d.shape[:-1])
    for first in range(0, patterns, _PATTERNS):
        rows = min(_PATTERNS, patterns - first)
        bits = (
            (np.arange(first, first + rows)[:, None] >> np.arange(n)) & 1
            if exact
            else rng.integers(2, size=(rows, n), dtype=np.int8)
        )
        count += (np.abs(d @ (1.0 - 2.0 * bits).T) >= (observed - slack)[..., None]).sum(axis=-1)
    return count / patterns if exact else (count + 1) / (draws + 1)


def holm(p: ArrayLike) -> Array:
    """Holm's step-down adjustment along the last axis (Holm 1979)."""
    x = np.asarray(p, dtype=float)
    order = np.argsort(x, axis=-1, kind="stable")
    sorted_p = np.take_along_axis(x, order, axis=-1)
    m = x.shape[-1]
    stepped = np.maximum.accumulate(sorted_p * (m - np.arange(m)), axis=-1)
    return _unsort(np.minimum(stepped, 1.0), order)


def benjamini_hochberg(p: ArrayLike) -> Array:
    """Step-up false discovery rate adjustment along the last axis (Benjamini & Hochberg 1995)."""
    x = np.asarray(p, dtype=float)
    order = np.argsort(x, axis=-1, kind="stable")
    sorted_p = np.take_along_axis(x, order, axis=-1)
    m = x.shape[-1]
    scaled = sorted_p * m / (np.arange(m) + 1)
    stepped = np.minimum.accumulate(scaled[..., ::-1], axis=-1)[..., ::-1]
    return _unsort(np.minimum(stepped, 1.0), order)


def _unsort(values: Array, order: NDArray[np.intp]) -> Array:
    out = np.empty_like(values)
    np.put_along_axis(out, order, values, axis=-1)
    return out


ADJUST = {"holm": holm, "bh": benjamini_hochberg}


@dataclass(frozen=True)
class Tests:
    """What every verdict rests on; arrays [..., m], one entry a comparison."""

    effect: Array
    p: Array
    """Two-sided, of no difference."""
    within: Array
    """Small where the difference is shown to lie within the margin."""
    beyond: Array
    """Small where it is shown to lie outside."""


def t_tests(e: Estimate, margin: ArrayLike) -> Tests:
    """Return the t tests of estimates against their margins."""
    return Tests(e.effect, e.p, within(e, margin), beyond(e, margin))


@dataclass(frozen=True)
class Judged:
    """Verdicts of one family; boolean arrays [..., m]. Neither supported nor refuted means inconclusive."""

    supported: NDArray[np.bool_]
    refuted: NDArray[np.bool_]
    below_margin: NDArray[np.bool_]
    """Supported, yet shown to lie within the margin: real and negligible."""
    p: Array
    """Of the claim itself: of no difference, or of lying within the margin for `matches`."""
    p_adjusted: Array
    p_within: Array
    """Of lying within the margin, adjusted over its own family."""


def judge(t: Tests, claims: list[Claim], method: Literal["holm", "bh"], alpha: float = ALPHA) -> Judged:
    """Return the verdicts for a family of m claims on tests [..., m].

    A direction is supported where the adjusted two-sided p is under alpha and the effect has the claimed sign. It is
    refuted where the effect is shown to lie within the margin, or is significant the other way; both at once stays
    supported, marked below the margin. `matches` is supported by an effect shown to lie within the margin and refuted
    by one shown to lie beyond it. `differs` takes either sign. The tests of the claims are one family; the tests that
    refute are adjusted as a second one of the same size.
    """
    adjust = ADJUST[method]
    matches = np.array([c == "matches" for c in claims])
    sign = np.array([{"lower": -1.0, "higher": 1.0}.get(c, 0.0) for c in claims])
    p = np.where(matches, t.within, t.p)
    adjusted, counter = adjust(p), adjust(np.where(matches, t.beyond, t.within))
    hit, hit_counter = adjusted < alpha, counter < alpha
    named = (sign == 0) | (np.sign(t.effect) == sign)
    supported = hit & named
    refuted = (hit_counter & ~supported) | (hit & ~named)
    return Judged(
        supported, refuted, supported & hit_counter & ~matches, p, adjusted, np.where(matches, adjusted, counter)
    )
