"""Factors: type II analysis of a factorial with seeds as blocks: tests with seeds as the unit, partial omega squared.

`C(x, Sum)` coding, all two-way interactions that the design can estimate. Arrays of outcomes are [..., N], so that
one design serves a single study and thousands of simulated ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ablate.analysis.contrasts import Array

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

    @cached_property
    def blocks(self) -> NDArray[np.int64] | None:
        """Runs of each seed in one order of cells [seeds, cells]; None where seeds did not run the same cells."""
        seeds = self.codes["seed"]
        count = int(seeds.max()) + 1
        cell = np.array([c for k, c in self.codes.items() if k != "seed"]).T
        order = np.lexsort([*cell.T[::-1], seeds])
        if len(order) % count:
            return None
        order = order.reshape(count, -1)
        same = (cell[order] == cell[order[0]]).all() and (seeds[order] == np.arange(count)[:, None]).all()
        return order if same else None


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
    error_df: Array
    """Degrees of freedom of the error."""
    f: Array
    p: Array
    omega2: Array
    """Partial omega squared, from the classical type II sum of squares; slightly negative where there is nothing."""
    unit: Literal["seeds", "runs"]
    """What the error is taken over."""


def anova(d: Design, y: Array) -> list[Test]:
    """Test every term after all others that do not contain it (type II), outcomes [..., N].

    Seeds are the unit where all seeds ran the same cells: the error of a term is how it varies over seeds, so that a
    factor whose effect differs by seed is not taken for one that is the same in all. Else runs are, with an HC3
    covariance.
    """
    fitted = fit(d, y)
    strengths = omega2(d, fitted.beta, fitted.mse)
    by_seed = d.blocks is not None and len(d.blocks) > 1
    out = []
    for term, strength in zip(d.terms, strengths, strict=True):
        f, df, error = over_seeds(d, y, term) if by_seed else over_runs(d, fitted, term)
        # With a corrected error the term's own degrees of freedom shrink in the same ratio.
        own = error / (len(d.blocks) - 1) if by_seed and d.blocks is not None else np.asarray(float(df))
        p = np.asarray(stats.f.sf(f, own, error))
        out.append(Test(term, df, error, f, p, strength, "seeds" if by_seed else "runs"))
    return out


def over_seeds(d: Design, y: Array, term: Term) -> tuple[Array, int, Array]:
    """F of a term with its interaction with seeds as the error: F, its degrees of freedom and the error's [...].

    Both degrees of freedom are corrected for unequal variances of the term's contrasts by the mean of Greenhouse and
    Geisser's and Huynh and Feldt's factors (Stevens 1992; Huynh-Feldt as corrected by Lecoutre 1991): the first alone
    finds nothing at three seeds, the second alone exceeds 5% where one level is three times as noisy as the others.
    """
    assert d.blocks is not None
    cells = d.x[d.blocks[0]]
    others = [s for t, s in d.columns.items() if t != BLOCK and not set(term) <= set(t)]
    rest = np.hstack([cells[:, :1], *(cells[:, s] for s in others)])
    own = cells[:, d.columns[term]]
    q = np.linalg.qr(own - rest @ np.linalg.lstsq(rest, own, rcond=None)[0]).Q
    z = y[..., d.blocks] @ q
    n, df = len(d.blocks), q.shape[1]
    mean = z.mean(-2)
    spread = z - mean[..., None, :]
    covariance = np.swapaxes(spread, -1, -2) @ spread / (n - 1)
    trace = np.einsum("...ii->...", covariance)
    squares = np.square(covariance).sum((-1, -2))
    with np.errstate(divide="ignore", invalid="ignore"):
        f = n * np.square(mean).sum(-1) / trace
        f = np.where(trace > 0, f, np.where(np.abs(mean).sum(-1) > 0, np.inf, 0.0))
        low = np.where(squares > 0, trace**2 / (df * squares), 1.0)
        left = n - 1 - df * low
        high = np.where(left > 1e-9, (n * df * low - 2) / (df * left), 1.0)
    factor = (np.clip(low, 1 / df, 1) + np.clip(high, 1 / df, 1)) / 2
    return f, df, factor * df * (n - 1)


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


def over_runs(d: Design, fitted: Fit, term: Term) -> tuple[Array, int, Array]:
    """F of a term with an HC3 covariance of the runs: F, its degrees of freedom and the error's [...].

    The hypothesis is that of the classical type II test, from (X'X)^-1. statsmodels' `anova_lm(typ=2, robust='hc3')`
    takes it from HC3 as well, which mixes interactions into main effects.
    """
    rows, df = _rows(d, term)
    keep = _hypothesis(d.inverse[np.ix_(rows, rows)], df)
    b = fitted.beta[..., rows] @ keep.T
    v = keep @ fitted.robust[..., rows, :][..., :, rows] @ keep.T
    f = np.einsum("...i,...i->...", b, np.linalg.solve(v, b[..., None])[..., 0]) / df
    return np.asarray(f), df, np.full(f.shape, float(d.residual))


def bootstrap_omega2(d: Design, y: Array, rng: np.random.Generator, draws: int = 400, level: float = 0.95) -> Array:
    """Percentile intervals of partial omega squared [terms, 2]: seeds are resampled with all their runs; y [N].

    Needs every seed to have run the same cells; raises ValueError otherwise. At three seeds it covers well under its
    level.
    """
    order = d.blocks
    if order is None:
        raise ValueError("seeds have different cells: their runs cannot be exchanged")
    count = len(order)
    by_seed = y[order]
    by_seed = by_seed - by_seed.mean(
        1, keepdims=True
    )  # what the blocks take up, so that only the cells' profile is left
    tested = np.concatenate([np.arange(d.columns[t].start, d.columns[t].stop) for t in d.terms])
    cells = d.x[order[0]][:, tested]
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


def level_by_seed(d: Design, y: Array, factor: str, level: int) -> dict[int, float]:
    """Level minus base level (0) of a factor in each seed, from main effects fitted to that seed's runs alone; y [N].

    In a balanced fraction this is the difference of the two levels' means. Seeds whose runs cannot tell the factor
    from the others are left out.
    """
    names = [k for k in d.codes if k != "seed"]
    out = {}
    for seed in np.unique(d.codes["seed"]).tolist():
        rows = d.codes["seed"] == seed
        columns = {k: sum_coding(d.codes[k])[rows] for k in names}
        rest = np.hstack([np.ones((int(rows.sum()), 1)), *(c for k, c in columns.items() if k != factor)])
        own = columns[factor]
        left = own - rest @ np.linalg.lstsq(rest, own, rcond=None)[0]
        if np.linalg.matrix_rank(left) < own.shape[1]:
            continue
        beta = np.linalg.lstsq(left, y[rows], rcond=None)[0]
        table = np.vstack([np.eye(own.shape[1]), -np.ones((1, own.shape[1]))])
        out[int(seed)] = float((table[level] - table[0]) @ beta)
    return out


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
