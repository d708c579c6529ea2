"""What the surrogate of a search says: which settings matter, and how the objectives change over one or two of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablate.analysis.arms import level_text
from ablate.analysis.contrasts import Array
from ablate.analysis.search.candidates import Search
from ablate.analysis.search.surrogate import Axis, Surrogate, axes, fit, settle

LEAST = 8
"""Candidates below which nothing is said about settings."""
MOST = 200
"""Candidates that the surrogate is fitted to; an even choice of more."""
AROUND = 64
"""Settings of the other factors over which a prediction is averaged."""
STEPS = 13
BINS = 6
WHOLE = 10
"""Integers that a map shows one by one; wider ranges fall into BINS cells."""
RESAMPLES = 100
MAPPED = ("tree.depth", "tree.leaf_width", "tree.mirror", "tree.init")
DIGITS = 4


def landscape(search: Search, rng: np.random.Generator) -> dict[str, Any]:
    """Fit one surrogate an objective, as {surrogate, importance, dependence, maps}; numbers at four significant digits.

    An objective of which too few candidates are known, or whose surrogate predicts a left-out candidate no better than
    the mean of the others, has its reason in `surrogate` and nothing elsewhere.
    """
    out: dict[str, Any] = {"surrogate": [], "importance": [], "dependence": [], "maps": []}
    names = [f for f in search.factors if f in search.tables.study.factors]
    for i, (objective, means) in enumerate(zip(search.objectives, search.race, strict=True)):
        record: dict[str, Any] = {"objective": objective, "n": len(means.arms), "left_out_r2": None, "withheld": ""}
        out["surrogate"].append(record)
        if not names:
            record["withheld"] = "no factor has more than one value yet"
        elif len(means.arms) < LEAST:
            record["withheld"] = f"{len(means.arms)} candidates with no diverged run: at least {LEAST} are needed"
        elif np.ptp(means.mean) == 0:
            record["withheld"] = "every candidate has the same mean"
        if record["withheld"]:
            continue
        at = np.unique(np.linspace(0, len(means.arms) - 1, min(MOST, len(means.arms))).round().astype(int))
        settings = [search.settings[means.arms[j]] for j in at]
        found = axes(search.tables.study.factors, {f: [s[f] for s in settings if f in s] for f in names})
        codes = np.array([[a.code(s[a.name]) if a.name in s else np.nan for a in found] for s in settings])
        known = search.noise.covariance[i, i] if search.noise.df else 0.0
        model = fit(found, codes, means.mean[at], known * means.factor[at])
        record["left_out_r2"] = rounded(model.left_out())
        if record["left_out_r2"] <= 0:
            record["withheld"] = "settings predict a left-out candidate no better than the mean of the others"
            continue
        pools = [codes[~np.isnan(codes[:, j]), j] for j in range(len(found))]
        out["importance"] += importances(model, objective, pools, rng)
        around = codes[np.unique(np.linspace(0, len(codes) - 1, min(AROUND, len(codes))).round().astype(int))]
        out["dependence"] += [dependence(model, objective, j, around, pools, rng) for j in range(len(found))]
        out["maps"] += [map_of(model, objective, pair, around, pools, rng) for pair in _pairs(found, out, objective)]
    return out


def importances(model: Surrogate, objective: str, pools: list[Array], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Functional analysis of variance of the surrogate over the space as the study file gives it, uniformly.

    `value` is the share of the surrogate's variance that a factor explains alone, `total` the share that goes when it
    is kept fixed (interactions included). Intervals are 95% percentiles over resampled candidates.
    """
    whole = model.kernel(settle(_uniform(model.axes, 400, rng), model.axes, pools, rng))
    around = settle(_uniform(model.axes, AROUND, rng), model.axes, pools, rng)
    swept = []
    for j, axis in enumerate(model.axes):
        base = around[~np.isnan(around[:, j])]
        grid = _even(axis, STEPS)
        points = _swept(model, base, {j: grid}, pools, rng)
        swept.append((len(grid), len(base) / AROUND, model.kernel(points)))
    shares = []
    for r in range(RESAMPLES + 1):
        rows = rng.integers(len(model.y), size=len(model.y)) if r else np.arange(len(model.y))
        at, weight, _ = model.weights(rows)
        variance = float((whole[:, at] @ weight).var())
        own = []
        for count, share, kernel in swept:
            f = (kernel[:, at] @ weight).reshape(count, -1)
            parts = (f.mean(1).var(), f.var(0).mean()) if f.size else (0.0, 0.0)
            own.append([share * p for p in parts])
        # Both are estimates: what the factors explain alone is never more than the whole.
        variance = max(variance, sum(alone for alone, _ in own))
        shares.append([[p / variance if variance > 0 else 0.0 for p in parts] for parts in own])
    drawn = np.clip(np.array(shares), 0, 1)
    low, high = np.quantile(drawn[1:], [0.025, 0.975], axis=0)
    found = [
        {
            "factor": axis.name,
            "endpoint": objective,
            "measure": "fanova",
            "value": rounded(drawn[0, j, 0]),
            "interval": [rounded(low[j, 0]), rounded(high[j, 0])],
            "total": rounded(drawn[0, j, 1]),
            "total_interval": [rounded(low[j, 1]), rounded(high[j, 1])],
            "n": len(model.y),
        }
        for j, axis in enumerate(model.axes)
    ]
    return sorted(found, key=lambda r: -float(r["value"]))


def dependence(
    model: Surrogate, objective: str, j: int, around: Array, pools: list[Array], rng: np.random.Generator
) -> dict[str, Any]:
    """Partial dependence on one factor: the prediction averaged over the candidates' other settings, with 95% bands.

    `n` counts the candidates nearest to each value; the band is the surrogate's own and widens where there are none.
    """
    axis = model.axes[j]
    grid = axis.grid(STEPS)
    codes = [axis.code(v) for v in grid]
    base = _active(model, around, (j,), pools, rng)
    mean, half = _averaged(model, _swept(model, base, {j: codes}, pools, rng), len(codes))
    return {
        "objective": objective,
        "factor": axis.name,
        "ordered": axis.ordered,
        "log": axis.log,
        "at": [v if axis.ordered else level_text(v) for v in grid],
        "mean": [rounded(v) for v in mean],
        "low": [rounded(v) for v in mean - half],
        "high": [rounded(v) for v in mean + half],
        "n": _nearest(model.codes[:, j], codes).tolist(),
    }


def map_of(
    model: Surrogate,
    objective: str,
    pair: tuple[int, int],
    around: Array,
    pools: list[Array],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Predictions over two factors at once, null in cells in which no candidate lies; `n` counts those."""
    first, second = (model.axes[j] for j in pair)
    grids = [_centres(a) for a in (first, second)]
    codes = [[a.code(v) for v in grid] for a, grid in zip((first, second), grids, strict=True)]
    base = _active(model, around, pair, pools, rng)
    points = _swept(model, base, dict(zip(pair, codes, strict=True)), pools, rng)
    mean, _ = _averaged(model, points, len(codes[0]) * len(codes[1]))
    n = np.zeros((len(codes[0]), len(codes[1])), dtype=int)
    for row in model.codes[:, list(pair)]:
        if not np.isnan(row).any():
            n[_place(row[0], codes[0]), _place(row[1], codes[1])] += 1
    table = mean.reshape(n.shape)
    return {
        "objective": objective,
        "factors": [first.name, second.name],
        "levels": [[level_text(_short(v)) for v in grid] for grid in grids],
        "mean": [[rounded(v) if k else None for v, k in zip(a, b, strict=True)] for a, b in zip(table, n, strict=True)],
        "n": n.tolist(),
    }


def _pairs(found: list[Axis], out: dict[str, Any], objective: str) -> list[tuple[int, int]]:
    """Pairs of the shape's factors; of the most important ones where the search has fewer than two of those."""
    names = [a.name for a in found]
    chosen = [f for f in MAPPED if f in names]
    if len(chosen) < 2:
        leading = [r["factor"] for r in out["importance"] if r["endpoint"] == objective]
        chosen = list(dict.fromkeys([*chosen, *leading]))[:3]
    return list(itertools.combinations([names.index(f) for f in chosen], 2))


def _centres(axis: Axis) -> list[Any]:
    if axis.levels or (axis.integer and axis.high - axis.low < WHOLE):
        return axis.grid(WHOLE)
    edges = np.linspace(0, 1, 2 * BINS + 1)[1::2]
    low, high = np.log([axis.low, axis.high]) if axis.log else (axis.low, axis.high)
    values = [float(low + e * (high - low)) for e in edges]
    return [float(np.exp(v)) for v in values] if axis.log else values


def _short(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _even(axis: Axis, count: int) -> list[float]:
    """Codes that stand for the whole axis with equal weight: its levels or integers, else middles of equal cells."""
    grid = axis.grid(count)
    if axis.levels or (axis.integer and axis.high - axis.low < len(grid)):
        return [axis.code(v) for v in grid]
    return [(i + 0.5) / count for i in range(count)]


def _uniform(found: list[Axis], count: int, rng: np.random.Generator) -> Array:
    """Draw a Latin hypercube [count, d]: every axis is covered evenly."""
    columns = []
    for a in found:
        codes = np.array(_even(a, count))
        columns.append(codes[rng.permutation(count) * len(codes) // count])
    return np.stack(columns, axis=1)


def _active(
    model: Surrogate, around: Array, at: tuple[int, ...], pools: list[Array], rng: np.random.Generator
) -> Array:
    """Settings in which these factors play a part; where no candidate has them all, their conditions are made true."""
    kept = around[~np.isnan(around[:, list(at)]).any(1)]
    if len(kept):
        return kept
    forced = around.copy()
    for j in at:
        for k, code in model.axes[j].when:
            forced[:, k] = code
    return settle(forced, model.axes, pools, rng)


def _swept(
    model: Surrogate, base: Array, grids: dict[int, list[float]], pools: list[Array], rng: np.random.Generator
) -> Array:
    """Rows of `base` at every combination of the grids [combinations · len(base), d], conditions kept true."""
    rows = []
    for values in itertools.product(*grids.values()):
        moved = base.copy()
        for j, value in zip(grids, values, strict=True):
            moved[:, j] = value
        rows.append(moved)
    return settle(np.concatenate(rows), model.axes, pools, rng)


def _averaged(model: Surrogate, points: Array, count: int) -> tuple[Array, Array]:
    """Mean prediction of each of `count` groups of rows and half its 95% interval, in the objective's unit."""
    kernel = model.kernel(points).reshape(count, -1, len(model.y)).mean(1)
    _, weight, middle = model.weights()
    groups = points.reshape(count, -1, points.shape[1])
    prior = np.array([model.kernel(g, g).mean() for g in groups])
    posterior = prior - np.einsum("cn,nc->c", kernel, model.solve(kernel.T))
    half = 1.96 * np.sqrt(np.maximum(posterior, 0))
    return model.centre + model.spread * (kernel @ weight + middle), model.spread * half


def _nearest(codes: Array, grid: list[float]) -> NDArray[np.int64]:
    n = np.zeros(len(grid), dtype=np.int64)
    for code in codes[~np.isnan(codes)]:
        n[_place(code, grid)] += 1
    return n


def _place(code: float, grid: list[float]) -> int:
    return int(np.abs(np.array(grid) - code).argmin())


def rounded(value: Any) -> float:
    """A number at four significant digits: a surrogate is not known more exactly, and machines differ in the last ones."""
    return float(f"{float(value):.{DIGITS}g}")
