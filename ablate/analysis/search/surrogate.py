"""A small Gaussian process over the settings of a search: what its candidates say about settings nobody tried."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize

from ablate.analysis.contrasts import Array
from ablate.analysis.search.candidates import same
from ablate.config import Factor

# Hyperparameters, as logarithms: mean and sd of their normal priors.
LENGTH, SCALE, NUGGET = (0.4, 1.0), (0.0, 0.5), (-3.0, 1.5)
# Hyperparameters are rounded to this, so that two machines' last digits do not differ.
GRAIN = 0.05


@dataclass(frozen=True)
class Axis:
    """One factor as the surrogate sees it: a number in 0..1, or the place of a level; NaN where it plays no part."""

    name: str
    levels: tuple[Any, ...]
    """All levels of a factor that is no range, numbers in ascending order."""
    ordered: bool
    """Whether nearness in value means anything."""
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False
    when: tuple[tuple[int, float], ...] = ()
    """Places of other axes, and the code each must have for this one to play a part."""

    def code(self, value: Any) -> float:
        """A setting as a number; NaN for one that is none of the levels."""
        if self.levels:
            at = next((i for i, level in enumerate(self.levels) if same(level, value)), None)
            if at is None:
                return float("nan")
            return at / max(1, len(self.levels) - 1) if self.ordered else float(at)
        if value is None:
            return float("nan")
        return float((self._scale(value) - self._scale(self.low)) / (self._scale(self.high) - self._scale(self.low)))

    def grid(self, most: int) -> list[Any]:
        """Values to draw the factor at: its levels, its integers, or `most` even steps over the range."""
        if self.levels:
            return list(self.levels)
        if self.integer and self.high - self.low < most:
            return list(range(int(self.low), int(self.high) + 1))
        at = np.linspace(self._scale(self.low), self._scale(self.high), most)
        values = [float(np.exp(v) if self.log else v) for v in at]
        return list(dict.fromkeys(round(v) for v in values)) if self.integer else values

    def _scale(self, value: float) -> float:
        return float(np.log(value)) if self.log else float(value)

    @property
    def size(self) -> int:
        """Levels of an unordered factor, 0 of an ordered one."""
        return 0 if self.ordered else len(self.levels)


def axes(factors: dict[str, Factor], seen: dict[str, list[Any]]) -> list[Axis]:
    """Axes of the factors in `seen` (name to the settings of all candidates that have it)."""
    out: list[Axis] = []
    places: dict[str, int] = {}
    for name, values in seen.items():
        spec = factors[name]
        if spec.range is not None:
            whole = spec.range.integer or all(isinstance(v, int) for v in values)
            axis = Axis(name, (), True, spec.range.low, spec.range.high, spec.range.log, whole)
        else:
            levels = spec.levels or []
            numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in levels)
            axis = Axis(name, tuple(sorted(levels) if numbers else levels), numbers)
        places[name] = len(out)
        out.append(axis)
    return [replace(a, when=_conditions(factors[a.name], out, places)) for a in out]


def _conditions(factor: Factor, found: list[Axis], places: dict[str, int]) -> tuple[tuple[int, float], ...]:
    return tuple((places[k], found[places[k]].code(v)) for k, v in factor.when.items() if k in places)


def settle(codes: Array, found: list[Axis], pools: list[Array], rng: np.random.Generator) -> Array:
    """Rows of codes in which every factor plays a part exactly where its conditions are met.

    One that now plays a part takes a value that some candidate had; one that no longer does becomes NaN.
    """
    out = codes.copy()
    for _ in range(len(found)):  # a condition may itself be conditional
        for j, axis in enumerate(found):
            if not axis.when:
                continue
            active = np.all([np.isclose(out[:, k], code) for k, code in axis.when], axis=0)
            out[~active, j] = np.nan
            empty = active & np.isnan(out[:, j])
            out[empty, j] = rng.choice(pools[j], size=int(empty.sum())) if len(pools[j]) else 0.5
    return out


def distances(a: Array, b: Array, found: list[Axis]) -> Array:
    """Squared distances [d, n, m] between rows of codes, one entry a factor; 1 between two levels or the range's ends."""
    out = np.empty((len(found), len(a), len(b)))
    for j, axis in enumerate(found):
        x, y = a[:, j, None], b[None, :, j]
        gone, lost = np.isnan(x), np.isnan(y)
        if axis.size:
            out[j] = np.where(gone | lost, gone != lost, x != y)
        else:
            # A factor without a part sits at the middle, off to the side: far from every value, the same to itself.
            near = (np.where(gone, 0.5, x) - np.where(lost, 0.5, y)) ** 2
            out[j] = near + 0.75 * (gone != lost)
    return out


@dataclass(frozen=True)
class Surrogate:
    """A fitted process: squared-exponential, one length a factor, known noise of the means and a nugget."""

    axes: list[Axis]
    codes: Array
    y: Array
    """Means in units of their spread, about 0."""
    noise: Array
    """Variance of each mean and the nugget, in the same units."""
    lengths: Array
    scale: float
    centre: float
    spread: float

    def kernel(self, points: Array, others: Array | None = None) -> Array:
        """Prior covariance [n, m] of rows of codes with the candidates, or with other rows."""
        out = np.empty((len(points), len(self.codes if others is None else others)))
        for start in range(0, len(points), 512):
            far = distances(points[start : start + 512], self.codes if others is None else others, self.axes)
            out[start : start + 512] = self.scale**2 * np.exp(-0.5 * np.einsum("dnm,d->nm", far, self.lengths**-2.0))
        return out

    def weights(self, rows: NDArray[np.int64] | None = None) -> tuple[NDArray[np.int64], Array, float]:
        """Candidates used, their weights in a prediction, and its offset; of all candidates, or of a resample."""
        at = np.arange(len(self.y)) if rows is None else rows
        own = self.y[at]
        middle = float(own.mean())
        factor = linalg.cho_factor(self.kernel(self.codes[at], self.codes[at]) + np.diag(self.noise[at]))
        return at, linalg.cho_solve(factor, own - middle), middle

    def solve(self, columns: Array) -> Array:
        """The inverse covariance of the candidates times columns [n, c]."""
        factor = linalg.cho_factor(self.kernel(self.codes) + np.diag(self.noise))
        return np.asarray(linalg.cho_solve(factor, columns))

    def left_out(self) -> float:
        """R² of predicting each candidate from all the others; under 0 the mean of all would do better."""
        inverse = self.solve(np.eye(len(self.y)))
        error = (inverse @ (self.y - self.y.mean())) / np.diag(inverse)
        return float(1 - (error**2).sum() / ((self.y - self.y.mean()) ** 2).sum())


def fit(found: list[Axis], codes: Array, means: Array, variance: Array) -> Surrogate:
    """Fit the process to candidates [n, d] with means [n] whose variances [n] are known (0 where they are not).

    The posterior mode under weak priors, by L-BFGS from the priors' means. Raises ValueError for means without spread.
    """
    centre, spread = float(means.mean()), float(means.std())
    if spread == 0:
        raise ValueError("every candidate has the same mean")
    y, known = (means - centre) / spread, variance / spread**2
    far = distances(codes, codes, found)
    prior = np.array([LENGTH] * len(found) + [SCALE, NUGGET])

    def loss(theta: Array) -> tuple[float, Array]:
        lengths, scale, nugget = np.exp(theta[:-2]), np.exp(theta[-2]), np.exp(theta[-1])
        smooth = scale**2 * np.exp(-0.5 * np.einsum("dnm,d->nm", far, lengths**-2.0))
        root = linalg.cholesky(smooth + np.diag(known + nugget + 1e-6), lower=True)
        inverse = linalg.cho_solve((root, True), np.eye(len(y)))
        alpha = inverse @ y
        pull = (theta - prior[:, 0]) / prior[:, 1]
        value = 0.5 * y @ alpha + np.log(np.diag(root)).sum() + 0.5 * (pull**2).sum()
        outer = inverse - np.outer(alpha, alpha)
        slope = np.empty_like(theta)
        weighted = outer * smooth
        slope[:-2] = 0.5 * np.einsum("dnm,nm->d", far, weighted) * lengths**-2.0
        slope[-2] = weighted.sum()
        slope[-1] = 0.5 * np.trace(outer) * nugget
        return float(value), slope + pull / prior[:, 1]

    bounds = [(-2.5, 4.0)] * len(found) + [(-2.0, 2.0), (-9.0, 1.0)]
    best = optimize.minimize(loss, prior[:, 0], jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 80})
    theta = np.round(best.x / GRAIN) * GRAIN
    return Surrogate(
        found, codes, y, known + np.exp(theta[-1]) + 1e-6, np.exp(theta[:-2]), float(np.exp(theta[-2])), centre, spread
    )
