"""Factors: type II analysis of a factorial with seeds as blocks, robust (HC3) tests, partial omega squared.

`C(x, Sum)` coding, all two-way interactions that the design can estimate. Arrays of outcomes are [..., N], so that
one design
serves a single study and thousands of simulated ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ablate.analysis.contrasts import Array, Estimate

Term = tuple[str, ...]
BLOCK: Term = ("seed",)


def sum_coding(codes: NDArray[np.int64]) -> Array:
    """Columns of `C(x, Sum)`: level i < last has a 1 in column i, the last level -1 in all; codes [N] -> [N, levels -
    1].
    """
    levels = int(codes.max()) + 1
    table = np.vstack([np.eye(levels - 1), -np.ones((1, levels - 1))])
    return np.asarray(table[codes])


@dataclass(frozen=True)
class Design:
    """Columns of a factorial and which of them belong to which term."""

    x: Array
    """[N, p], intercept first."""
    columns: dict[Term, slice]
    """Block, main effects (one name) and interactions (two names)."""
    codes: dict[str, NDArray[np.int64]]
    """Level of each factor in each run, by name; the seed too."""
    left_out: tuple[Term, ...]
    """Interactions that the runs cannot estimate."""

    @property
    def terms(self) -> list[Term]:
        """Terms under test: all but the block."""
        return [t for t in self.columns if t != BLOCK]

    @property
    def residual(self) -> int:
        """Residual degrees of freedom."""
        return int(self.x.shape[0] - self.x.shape[1])

    @cached_property
    def inverse(self) -> Array:
        """Inverse of X'X [p, p]."""
        return np.asarray(np.linalg.inv(self.x.T @ self.x))


def design(codes: dict[str, NDArray[np.int64]], seeds: NDArray[np.int64]) -> Design:
    """Design of runs with factor levels `codes` (0-based, [N] each) and seeds (0-based, [N]).

    An interaction is left out where it adds less than its full degrees of freedom (an unfinished or fractional grid).
    Raises ValueError where even the main effects cannot be separated.
    """
    n = len(seeds)
    parts = [np.ones((n, 1))]
    basis = np.full((n, 1), 1 / np.sqrt(n))  # orthonormal, of the columns so far
    columns: dict[Term, slice] = {}

    def add(term: Term, block: Array) -> bool:
        nonlocal basis
        left = block - basis @ (basis.T @ block)
        left -= basis @ (basis.T @ left)  # twice is enough (Kahan)
        q, r = np.linalg.qr(left)
        if (np.linalg.svd(r, compute_uv=False) <= 1e-9 * np.linalg.norm(block)).any():
            return False
        start = sum(p.shape[1] for p in parts)
        parts.append(block)
        basis = np.hstack([basis, q])
        columns[term] = slice(start, start + block.shape[1])
        return True

    mains = {name: sum_coding(c) for name, c in codes.items()}
    if seeds.max() > 0 and not add(BLOCK, sum_coding(seeds)):
        raise ValueError("seeds cannot be separated from the intercept")
    for name, block in mains.items():
        if not add((name,), block):
            raise ValueError(f"factor {name!r} cannot be separated from the others in these runs")
    left_out = []
    for a, b in itertools.combinations(codes, 2):
        product = (mains[a][:, :, None] * mains[b][:, None, :]).reshape(n, -1)
        if not add((a, b), product):
            left_out.append((a, b))
    return Design(np.hstack(parts), columns, {**codes, "seed": seeds}, tuple(left_out))


@dataclass(frozen=True)
class Fit:
    """Ordinary least squares of outcomes [..., N]; arrays lead with the outcomes' axes."""

    beta: Array
    residuals: Array
    mse: Array
    robust: Array
    """HC3 covariance [..., p, p] (MacKinnon & White 1985)."""


def fit(d: Design, y: Array) -> Fit:
    """Fit outcomes [..., N]; needs at least one residual degree of freedom."""
    if d.residual < 1:
        raise ValueError(f"{d.x.shape[0]} runs leave no residual freedom for {d.x.shape[1]} parameters")
    hat = d.inverse @ d.x.T
    beta = y @ hat.T
    residuals = y - beta @ d.x.T
    mse = np.square(residuals).sum(-1) / d.residual
    leverage = np.einsum("np,pn->n", d.x, hat)
    weight = np.square(residuals / (1 - leverage))
    robust = (hat * weight[..., None, :]) @ hat.T
    return Fit(beta, residuals, mse, robust)


@dataclass(frozen=True)
class Test:
    """Type II test of one term, [...]."""

    term: Term
    df: int
    f: Array
    """Robust F."""
    p: Array
    """Of the robust F."""
    omega2: Array
    """Partial omega squared, from the classical type II sum of squares; slightly negative where there is nothing."""


def anova(d: Design, y: Array) -> list[Test]:
    """Test every term after all others that do not contain it (type II), outcomes [..., N].

    The hypothesis is that of the classical type II test, from (X'X)^-1; only its covariance is HC3. statsmodels'
    `anova_lm(typ=2, robust='hc3')` takes the hypothesis from HC3 as well, which mixes interactions into main effects:
    with an interaction of twice the noise it finds a main effect that is not there in 44% of studies.
    """
    fitted = fit(d, y)
    strengths = omega2(d, fitted.beta, fitted.mse)
    out = []
    for term, strength in zip(d.terms, strengths, strict=True):
        f, df = _wald(d, fitted, term)
        out.append(Test(term, df, f, stats.f.sf(f, df, d.residual), strength))
    return out


def omega2(d: Design, beta: Array, mse: Array) -> list[Array]:
    """Partial omega squared of every term [...], from coefficients [..., p] and error variances [...]."""
    n = d.x.shape[0]
    out = []
    for term in d.terms:
        rows, df = _rows(d, term)
        inverse = d.inverse[np.ix_(rows, rows)]
        hypothesis = _hypothesis(inverse, df)
        b = beta[..., rows] @ hypothesis.T
        weight = np.linalg.inv(hypothesis @ inverse @ hypothesis.T)
        squares = np.einsum("...i,ij,...j->...", b, weight, b)  # the term's type II sum
        with np.errstate(divide="ignore", invalid="ignore"):
            out.append(np.asarray((squares - df * mse) / (squares + (n - df) * mse)))
    return out


def _rows(d: Design, term: Term) -> tuple[list[int], int]:
    """Columns of the term, then of all terms that contain it; and the term's degrees of freedom."""
    own = d.columns[term]
    above = [s for t, s in d.columns.items() if set(term) < set(t)]
    rows = [*range(own.start, own.stop), *itertools.chain.from_iterable(range(s.start, s.stop) for s in above)]
    return rows, own.stop - own.start


def _hypothesis(v: Any, df: int) -> Any:
    """Return what is left of a term once the terms that contain it are projected out: v [k, k] -> [df, k].

    `v` is the block of (X'X)^-1 of the term's own columns, then of the columns of the terms that contain it.
    """
    if len(v) == df:
        return np.eye(df)
    return np.linalg.qr(v[:, df:], mode="complete").Q[:, -df:].T


def _wald(d: Design, fitted: Fit, term: Term) -> tuple[Array, int]:
    rows, df = _rows(d, term)
    keep = _hypothesis(d.inverse[np.ix_(rows, rows)], df)
    b = fitted.beta[..., rows] @ keep.T
    v = keep @ fitted.robust[..., rows, :][..., :, rows] @ keep.T
    f = np.einsum("...i,...i->...", b, np.linalg.solve(v, b[..., None])[..., 0]) / df
    return np.asarray(f), df


def bootstrap_omega2(d: Design, y: Array, rng: np.random.Generator, draws: int = 400, level: float = 0.95) -> Array:
    """Percentile intervals of partial omega squared [terms, 2]: seeds are resampled with all their runs; y [N].

    Needs every seed to have run the same cells; raises ValueError otherwise. At three seeds it covers well under its
    level.
    """
    seeds = d.codes["seed"]
    count = int(seeds.max()) + 1
    names = [k for k in d.codes if k != "seed"]
    cell = np.array([d.codes[k] for k in names]).T
    order = np.lexsort([*cell.T[::-1], seeds])
    if (
        len(order) % count
        or not (cell[order].reshape(count, -1, len(names)) == cell[order][: len(order) // count]).all()
    ):
        raise ValueError("seeds have different cells: their runs cannot be exchanged")
    by_seed = y[order].reshape(count, -1)
    by_seed = by_seed - by_seed.mean(
        1, keepdims=True
    )  # what the blocks take up, so that only the cells' profile is left
    tested = np.concatenate([np.arange(d.columns[t].start, d.columns[t].stop) for t in d.terms])
    cells = d.x[order][: by_seed.shape[1]][:, tested]
    cells = cells - cells.mean(0)
    picked = rng.integers(count, size=(draws, count))
    often = np.zeros((draws, count))
    np.add.at(often, (np.arange(draws)[:, None], picked), 1.0)
    profile = often @ by_seed / count
    beta = np.zeros((draws, d.x.shape[1]))
    beta[:, tested] = np.linalg.lstsq(cells, profile.T, rcond=None)[0].T
    explained = count * np.square(beta[:, tested] @ cells.T).sum(-1)
    mse = np.maximum(often @ np.square(by_seed).sum(-1) - explained, 0.0) / d.residual
    values = np.array(omega2(d, beta, mse))
    return np.asarray(np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2], axis=1).T)


def level_effect(d: Design, fitted: Fit, factor: str, level: int, base: int) -> Estimate:
    """Level minus base level of a factor [...], over the other factors' marginal means; t on HC3, residual freedom."""
    vector = np.zeros(d.x.shape[1])
    levels = int(d.codes[factor].max()) + 1
    rows = np.vstack([np.eye(levels - 1), -np.ones((1, levels - 1))])
    vector[d.columns[factor,]] = rows[level] - rows[base]
    effect = fitted.beta @ vector
    se = np.sqrt(np.einsum("p,...pq,q->...", vector, fitted.robust, vector))
    df = np.full(effect.shape, float(d.residual))
    half = stats.t.ppf(0.975, df) * se
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(se > 0, 2 * stats.t.sf(np.abs(effect) / se, df), np.where(effect == 0, 1.0, 0.0))
    return Estimate(effect, se, df, effect - half, effect + half, p, np.sqrt(fitted.mse))


def standing(tests: Sequence[Test], adjusted: Array, alpha: float) -> dict[Term, Array]:
    """For each main effect, whether an interaction that contains it is significant (adjusted p < alpha) [...]: it is then no
    answer.

    `adjusted` [..., terms] in the order of `tests`.
    """
    out: dict[Term, Array] = {}
    for t in tests:
        if len(t.term) == 1:
            hits = [adjusted[..., i] < alpha for i, u in enumerate(tests) if len(u.term) == 2 and t.term[0] in u.term]
            out[t.term] = np.any(hits, axis=0) if hits else np.zeros(adjusted.shape[:-1], dtype=bool)
    return out
