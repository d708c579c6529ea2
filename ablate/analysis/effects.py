"""Factors: type II analysis of a factorial with seeds as blocks, robust (HC3) tests, partial omega squared.

`C(x, Sum)` coding, all two-way interactions that the design can estimate. Arrays of outcomes are [..., N], so that
one design
serves a single study and thousands of simulated ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

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


def design(codes: dict[str, NDArray[np.int64]], seeds: NDArray[np.int64]) -> Design:
    """Design of runs with factor levels `codes` (0-based, [N] each) and seeds (0-based, [N]).

    An interaction is left out where it adds less than its full degrees of freedom (an unfinished or fractional grid).
    Raises ValueError where even the main effects cannot be told apart.
    """
    n = len(seeds)
    parts = [np.ones((n, 1))]
    columns: dict[Term, slice] = {}

    def add(term: Term, block: Array) -> bool:
        wider = np.hstack([*parts, block])
        if np.linalg.matrix_rank(wider) < wider.shape[1]:
            return False
        start = sum(p.shape[1] for p in parts)
        parts.append(block)
        columns[term] = slice(start, start + block.shape[1])
        return True

    mains = {name: sum_coding(c) for name, c in codes.items()}
    if seeds.max() > 0 and not add(BLOCK, sum_coding(seeds)):
        raise ValueError("seeds cannot be told apart from the intercept")
    for name, block in mains.items():
        if not add((name,), block):
            raise ValueError(f"factor {name!r} cannot be told apart from the others in these runs")
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
    cov: Array
    """Classical covariance [..., p, p]."""
    robust: Array
    """HC3 covariance [..., p, p] (MacKinnon & White 1985)."""


def fit(d: Design, y: Array) -> Fit:
    """Fit outcomes [..., N]; needs at least one residual degree of freedom."""
    if d.residual < 1:
        raise ValueError(f"{d.x.shape[0]} runs leave no residual freedom for {d.x.shape[1]} parameters")
    inverse = np.linalg.inv(d.x.T @ d.x)
    hat = inverse @ d.x.T
    beta = y @ hat.T
    residuals = y - beta @ d.x.T
    mse = np.square(residuals).sum(-1) / d.residual
    leverage = np.einsum("np,pn->n", d.x, hat)
    weight = np.square(residuals / (1 - leverage))
    robust = np.einsum("pn,...n,qn->...pq", hat, weight, hat, optimize=True)
    return Fit(beta, residuals, mse, mse[..., None, None] * inverse, robust)


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
    """Partial omega squared, from the classical type II sum of squares; may be slightly negative where nothing is
    there.
    """


def anova(d: Design, y: Array) -> list[Test]:
    """Every term after all others that do not contain it (type II, as statsmodels' anova_lm(typ=2, robust='hc3'))."""
    fitted = fit(d, y)
    n = d.x.shape[0]
    out = []
    for term in d.terms:
        f, df = _wald(d, fitted, term, fitted.robust)
        classical, _ = _wald(d, fitted, term, fitted.cov)
        omega2 = df * (classical - 1) / (df * (classical - 1) + n)
        out.append(Test(term, df, f, stats.f.sf(f, df, d.residual), omega2))
    return out


def _wald(d: Design, fitted: Fit, term: Term, cov: Array) -> tuple[Array, int]:
    own = d.columns[term]
    above = [s for t, s in d.columns.items() if set(term) < set(t)]
    rows = [*range(own.start, own.stop), *itertools.chain.from_iterable(range(s.start, s.stop) for s in above)]
    df = own.stop - own.start
    b, v = fitted.beta[..., rows], cov[..., rows, :][..., :, rows]
    if above:
        # What is left of the term and all that contains it, once the containing terms are projected out.
        q = np.linalg.qr(v[..., :, df:], mode="complete").Q
        keep = np.swapaxes(q[..., :, -df:], -1, -2)
        b = np.einsum("...ij,...j->...i", keep, b)
        v = keep @ v @ np.swapaxes(keep, -1, -2)
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
    x = d.x[order]
    by_seed = y[order].reshape(count, -1)
    picked = rng.integers(count, size=(draws, count))
    sample = by_seed[picked].reshape(draws, -1)
    resampled = anova(Design(x, d.columns, d.codes, d.left_out), sample)
    tails = [(1 - level) / 2, (1 + level) / 2]
    values = np.array([t.omega2 for t in resampled])
    return np.asarray(np.nanquantile(values, tails, axis=1).T)


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
    """For each main effect, whether an interaction that contains it stands (adjusted p < alpha) [...]: it is then no
    answer.

    `adjusted` [..., terms] in the order of `tests`.
    """
    out: dict[Term, Array] = {}
    for t in tests:
        if len(t.term) == 1:
            hits = [adjusted[..., i] < alpha for i, u in enumerate(tests) if len(u.term) == 2 and t.term[0] in u.term]
            out[t.term] = np.any(hits, axis=0) if hits else np.zeros(adjusted.shape[:-1], dtype=bool)
    return out
