"""Endpoints with a heavy tail: now and then a run learns late and stays behind. What a comparison may then say.

Such an endpoint (`Endpoint.behind` above 0) is judged by signed ranks from LEAST pairs on: the mean of so few pairs has no
interval that holds, for the runs that move it are often not drawn. Below LEAST it keeps the mean's t interval, with a note.
That two arms are equal rests on more: on the ranks, on the mean, and on late runs being too rare to cost the margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ablate.analysis import contrasts, power, ranks
from ablate.analysis.contrasts import Array
from ablate.config.endpoints import ENDPOINTS, Endpoint

LEAST = 8
"""Pairs from which on signed ranks are used."""
TRIM = 0.2
"""Share cut off at each end for the trimmed mean that is shown beside the others."""


def heavy(endpoint: str) -> Endpoint | None:
    """Return the endpoint where it has a heavy tail, else None."""
    found = ENDPOINTS.get(endpoint)
    return found if found is not None and found.behind > 0 else None


def outlying(endpoint: str, values: dict[int, float]) -> list[int]:
    """Return the seeds of an arm's outlying runs: worse than the arm's median by more than the endpoint's `behind`."""
    of = heavy(endpoint)
    if of is None or not values:
        return []
    middle = float(np.median(list(values.values())))
    return [seed for seed, value in values.items() if of.sign * (value - middle) > of.behind]


def share_bound(a: ArrayLike, n_a: int, b: ArrayLike, n_b: int, level: float = 0.95) -> Array:
    """Return the upper end of Newcombe's interval of share a - share b (hybrid score, method 10; Newcombe 1998)."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    _, high = power.wilson(x * n_a, n_a, level)
    low, _ = power.wilson(y * n_b, n_b, level)
    return np.asarray(x - y + np.hypot(high - x, y - low))


def late_cost(endpoint: str, a: ArrayLike, n_a: int, b: ArrayLike, n_b: int) -> Array:
    """Return by how much late runs alone could make the mean of an arm worse than its reference's: a 95% bound.

    `a` and `b` are the shares of outlying runs among the `n_a` of the arm and the `n_b` of the reference. 0 where the
    endpoint has no heavy tail.
    """
    of = heavy(endpoint)
    return np.zeros(()) if of is None else np.asarray(of.lateness * share_bound(a, n_a, b, n_b))


def pairs_without_late_runs(endpoint: str, margin: float) -> int:
    """Return with how many pairs, and no late run among them, late runs can no longer cost the margin; 2 without a tail."""
    return next(n for n in count(2) if late_cost(endpoint, 0.0, n, 0.0, n) < margin)


@dataclass(frozen=True)
class Located:
    """Where the differences of comparisons lie; arrays [m]."""

    effect: Array
    low: Array
    high: Array
    sd: Array
    p: Array
    within: Array
    beyond: Array

    @property
    def tests(self) -> contrasts.Tests:
        """The tests that verdicts rest on."""
        return contrasts.Tests(self.effect, self.p, self.within, self.beyond)


def ranked(endpoint: str, n: int) -> bool:
    """Return whether n pairs of this endpoint are judged by signed ranks."""
    return heavy(endpoint) is not None and n >= LEAST


def locate(difference: ArrayLike, margin: ArrayLike, *, tail: bool = False, cost: ArrayLike = 0.0) -> Located:
    """Return effect, 95% interval and tests of paired differences [..., n], n >= 2.

    With a heavy `tail` and LEAST pairs or more, effect and interval are those of signed ranks, else those of the mean. With
    a tail, equality needs the whole 95% intervals of ranks and mean within the margin, and a `cost` of late runs within it.
    """
    d = np.asarray(difference, dtype=float)
    e = contrasts.paired(d)
    t = contrasts.t_tests(e, margin)
    if not tail:
        return Located(e.effect, e.low, e.high, e.sd, t.p, t.within, t.beyond)
    inside = t.within
    place: Any = e
    if d.shape[-1] >= LEAST:
        place, t = ranks.signed_rank(d), ranks.rank_tests(d, margin)
        inside = np.maximum(inside, t.within)
    inside = np.where(np.asarray(cost) >= np.asarray(margin), 1.0, np.minimum(1.0, 2 * inside))
    return Located(place.effect, place.low, place.high, e.sd, t.p, inside, t.beyond)


def no_worse(
    difference: ArrayLike, margin: float, *, tail: bool, cost: ArrayLike, level: float = 0.95
) -> tuple[Array, Array]:
    """Return the upper end of the interval of this two-sided level of differences [..., n], and p of lying over the margin.

    With a heavy `tail` both are the worse of ranks (from LEAST pairs on) and mean; p is doubled, as the interval is
    two-sided, and 1 where the `cost` of late runs reaches the margin.
    """
    d = np.asarray(difference, dtype=float)
    n = d.shape[-1]
    e = contrasts.paired(d, level)
    bound, p = e.high, contrasts.under(e, margin)
    if tail and n >= LEAST:
        bound = np.maximum(bound, ranks.signed_rank(d, level).high)
        p = np.maximum(p, ranks.below(ranks.walsh(d), margin, n))
    return bound, np.where(np.asarray(cost) >= margin, 1.0, np.minimum(1.0, 2 * p))


def unpaired(a: ArrayLike, b: ArrayLike, margin: ArrayLike) -> Located:
    """Return Welch's difference of a [..., n] and b [..., k], with its interval and tests."""
    e = contrasts.welch(a, b)
    t = contrasts.t_tests(e, margin)
    return Located(e.effect, e.low, e.high, e.sd, t.p, t.within, t.beyond)


def trimmed_mean(values: ArrayLike) -> float:
    """Return the mean without the TRIM largest and smallest values."""
    x = np.sort(np.asarray(values, dtype=float))
    cut = int(TRIM * len(x))
    return float(x[cut : len(x) - cut].mean())


def beside(endpoint: str, differences: dict[int, float], late: list[tuple[str, int]]) -> dict[str, Any]:
    """Return, for one comparison of paired differences by seed, the fields that stand beside its effect.

    `late` names the outlying runs (arm, seed); without their seeds the same estimate is given again.
    """
    d = np.array(list(differences.values()))
    mean = contrasts.paired(d)
    left = [v for seed, v in differences.items() if seed not in {s for _, s in late}]
    again: dict[str, Any] | None = None
    if late:
        again = {"effect": None, "interval": None, "n": len(left)}
        if len(left) >= 2:
            e = locate(left, 0.0, tail=heavy(endpoint) is not None)
            again |= {"effect": float(e.effect), "interval": [float(e.low), float(e.high)]}
    return {
        "statistic": "pseudomedian" if ranked(endpoint, len(d)) else "mean",
        "mean": float(mean.effect),
        "mean_interval": [float(mean.low), float(mean.high)],
        "median": float(np.median(d)),
        "trimmed_mean": trimmed_mean(d),
        "outlying": [{"arm": arm, "seed": seed} for arm, seed in late],
        "without_outlying": again,
    }


UNPAIRED: dict[str, Any] = {
    "statistic": "mean",
    "mean": None,
    "mean_interval": None,
    "median": None,
    "trimmed_mean": None,
    "outlying": [],
    "without_outlying": None,
}
"""The same fields where nothing is paired, or nothing could be tested."""


def notes(endpoint: str, n: int, margin: float, cost: float) -> list[str]:
    """Return what a reader must know at the verdict of n pairs: where the interval does not hold, and why equality is open."""
    if heavy(endpoint) is None:
        return []
    out = []
    if n < LEAST:
        out.append(
            f"{n} pairs: where runs learn late in one arm this t interval of the mean covers 66 to 77%, and no other holds"
        )
    if cost >= margin:
        out.append(
            f"late runs too rare to be seen in {n} pairs could cost {cost:.2g}: equality within {margin:g} cannot be shown"
        )
    return out
