"""Wilcoxon's signed ranks: the typical paired difference, with an interval that a few outlying runs do not undo.

The estimate is Hodges and Lehmann's: the median of the means of all pairs of differences, each with itself included (the
pseudomedian). The interval inverts Wilcoxon's exact signed-rank test. Both are exact where the differences are symmetric;
tests/analysis/test_late_runs.py shows what holds where they are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ablate.analysis.contrasts import Array, Tests


@dataclass(frozen=True)
class Ranked:
    """A typical difference with its interval; every field has the shape of the input without its last axis."""

    effect: Array
    low: Array
    high: Array
    p: Array
    """Two-sided, of no difference."""


def walsh(difference: ArrayLike) -> Array:
    """Return the sorted means of all pairs of differences [..., n], each with itself included: [..., n (n + 1) / 2]."""
    d = np.asarray(difference, dtype=float)
    i, j = np.triu_indices(d.shape[-1])
    return np.sort((d[..., i] + d[..., j]) / 2, axis=-1)


@cache
def null(n: int) -> Array:
    """Return P(T <= t) of Wilcoxon's rank sum T of n pairs where the differences are symmetric about 0, t = 0, 1, ..."""
    share = np.zeros(n * (n + 1) // 2 + 1)
    share[0] = 1.0
    for rank in range(1, n + 1):
        share[rank:], share[:rank] = (share[rank:] + share[:-rank]) / 2, share[:rank] / 2
    return np.cumsum(share)


def signed_rank(difference: ArrayLike, level: float = 0.95) -> Ranked:
    """Return Hodges and Lehmann's estimate of differences [..., n], n >= 2, with the interval and p of Wilcoxon's test.

    The interval has at least this level, or is the whole range of the differences where n is too small for that (under
    six for 95%).
    """
    d = np.asarray(difference, dtype=float)
    n = d.shape[-1]
    w = walsh(d)
    last = w.shape[-1] - 1
    k = max(0, int(np.searchsorted(null(n), (1 - level) / 2, side="right")) - 1)
    p = np.minimum(1.0, 2 * np.minimum(below(w, 0.0, n), above(w, 0.0, n)))
    return Ranked(np.asarray(np.median(w, axis=-1)), w[..., k], w[..., last - k], p)


def below(w: Array, bound: Any, n: int) -> Array:
    """Return P, small where the pseudomedian of walsh means `w` of n pairs is shown to lie below the bound."""
    return np.asarray(null(n)[_count(w, bound, 1.0)])


def above(w: Array, bound: Any, n: int) -> Array:
    """Return P, small where the pseudomedian of walsh means `w` of n pairs is shown to lie above the bound."""
    return np.asarray(null(n)[_count(w, bound, -1.0)])


def _count(w: Array, bound: Any, side: float) -> Any:
    """Count means on the far side of the bound; ties, up to rounding, count against the claim."""
    slack = 1e-12 * np.abs(w).max(axis=-1, initial=0.0)[..., None]
    return (side * (w - np.asarray(bound, dtype=float)[..., None]) >= -slack).sum(axis=-1)


def rank_tests(difference: ArrayLike, margin: ArrayLike) -> Tests:
    """Return the tests of differences [..., n] against margins [...]; the doubling of `beyond` pays for taking the side
    from the data.
    """
    d, m = np.asarray(difference, dtype=float), np.asarray(margin, dtype=float)
    n, w = d.shape[-1], walsh(d)
    e = signed_rank(d)
    inside = np.maximum(below(w, m, n), above(w, -m, n))
    outside = np.minimum(1.0, 2 * np.minimum(above(w, m, n), below(w, -m, n)))
    return Tests(e.effect, e.p, inside, outside)
