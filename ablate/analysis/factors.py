"""The factors of a grid: how much each matters for balance and for quality, and which of them cannot be read alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from ablate.analysis import contrasts, effects, tails
from ablate.analysis.arms import level_text
from ablate.analysis.contrasts import ALPHA
from ablate.analysis.effects import Design
from ablate.analysis.frames import Tables
from ablate.analysis.tails import Located
from ablate.analysis.verdicts import Runs, verdict
from ablate.config.endpoints import unit_of
from ablate.results.columns import FACTOR

COMBINATIONS = 12  # conditions of a simple effect that are listed one by one


def analyse_factors(
    tables: Tables, frame: pl.DataFrame, runs: Runs, endpoints: dict[str, float], rng: np.random.Generator
) -> dict[str, Any]:
    """Type II analysis per endpoint (name to margin), as {terms, findings, withheld}.

    Findings are level effects: of a factor over all cells where no interaction that contains it is significant, else its
    simple
    effects at the levels of the factors it interacts with. Seeds are the unit of both, and both families, terms and
    level effects, are adjusted by Benjamini-Hochberg.
    """
    out: dict[str, Any] = {"terms": [], "findings": [], "withheld": [], "left_out": [], "cells": []}
    if tables.study.design != "factorial" or not tables.factors:
        return out
    names = set(tables.grid()["arm"])
    grid = frame.filter(pl.col("arm").is_in(sorted(names)))
    fits = []
    for endpoint, margin in endpoints.items():
        rows = grid.filter(pl.col(endpoint).is_not_null()).sort("arm", "seed")
        problem = _problem(tables, rows, runs)
        if not problem and rows[endpoint].n_unique() == 1:
            problem = "every run has the same value"
        if problem:
            out["withheld"].append({"endpoint": endpoint, "reason": problem})
            continue
        levels = {f: _levels(tables, f, rows) for f in tables.factors}
        codes = {f: np.array([levels[f].index(level_text(v)) for v in rows[FACTOR + f]]) for f in tables.factors}
        codes = {f: c for f, c in codes.items() if c.max() > 0}
        seeds = np.unique(rows["seed"].to_numpy(), return_inverse=True)[1]
        y = rows[endpoint].to_numpy()
        try:
            d = effects.design(codes, seeds)
            tests = effects.anova(d, y)
        except (ValueError, np.linalg.LinAlgError) as error:
            out["withheld"].append({"endpoint": endpoint, "reason": str(error)})
            continue
        fits.append((endpoint, margin, rows, levels, d, y, tests))
        out["left_out"] += [{"endpoint": endpoint, "terms": list(t)} for t in d.left_out]
        out["cells"] += _cells(endpoint, tables.factors, rows, {f: _levels(tables, f, rows) for f in tables.factors})
    if not fits:
        return out
    flat = [(i, t) for i, fitted in enumerate(fits) for t in fitted[-1]]
    adjusted = contrasts.benjamini_hochberg(np.array([float(t.p) for _, t in flat]))
    family: list[dict[str, Any]] = []
    located: list[Located] = []
    for i, (endpoint, margin, rows, levels, d, y, tests) in enumerate(fits):
        own = np.array([a for (j, _), a in zip(flat, adjusted, strict=True) if j == i])
        stands = effects.standing(tests, own, ALPHA)
        try:
            intervals: Any = effects.bootstrap_omega2(d, y, rng)
        except (ValueError, np.linalg.LinAlgError):
            intervals = None
        for k, t in enumerate(tests):
            out["terms"].append(
                {
                    "endpoint": endpoint,
                    "term": list(t.term),
                    "df": t.df,
                    "error_df": float(t.error_df),
                    "unit": t.unit,
                    "f": float(t.f),
                    "p": float(t.p),
                    "p_adjusted": float(own[k]),
                    "family_size": len(flat),
                    "omega2": float(t.omega2),
                    "interval": None if intervals is None else intervals[k].tolist(),
                    "suppressed": bool(stands.get(t.term, False)),
                    "n": rows.height,
                    "run_ids": rows["run_id"].to_list(),
                }
            )
        for factor in (f for f in levels if f in d.codes):
            partners = _partners(factor, tests, own) if stands[factor,] else []
            for record, place in _level_effects(d, y, factor, partners, levels, rows, (endpoint, margin)):
                family.append(record)
                located.append(place)
    out["findings"] = _judged(family, located)
    return out


def _problem(tables: Tables, rows: pl.DataFrame, runs: Runs) -> str:
    if rows["seed"].n_unique() < 2:
        return "fewer than two seeds: no error to hold effects against"
    split = [runs.modes(a) for a in rows["arm"].unique(maintain_order=True) if runs.modes(a)]
    return split[0] if split else ""


def _levels(tables: Tables, factor: str, rows: pl.DataFrame) -> list[str]:
    """Levels that occur, the base's value first (the first of the file's where the base's does not occur)."""
    seen = {level_text(v) for v in rows[FACTOR + factor]}
    wanted = [level_text(v) for v in tables.study.factors[factor].levels or []]
    base = level_text(tables.study.trial({}).value(factor))
    kept = [w for w in wanted if w in seen] + sorted(seen - set(wanted))
    return sorted(kept, key=lambda v: v != base) if base in kept else kept


def _cells(endpoint: str, factors: list[str], rows: pl.DataFrame, levels: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Cell means of every pair of factors, for interaction plots."""
    out = []
    for a, b in itertools.combinations(factors, 2):
        keys = [FACTOR + a, FACTOR + b]
        groups = rows.group_by(keys, maintain_order=True).agg(
            pl.col(endpoint).mean().alias("mean"), pl.len().alias("n")
        )
        for row in groups.iter_rows(named=True):
            here = [level_text(row[k]) for k in keys]
            out.append({"endpoint": endpoint, "factors": [a, b], "levels": here, "mean": row["mean"], "n": row["n"]})
    places = {f: {v: i for i, v in enumerate(sorted(own, key=_reading_order(own)))} for f, own in levels.items()}
    return sorted(
        out, key=lambda c: (c["factors"], [places[f][v] for f, v in zip(c["factors"], c["levels"], strict=True)])
    )


def _reading_order(levels: list[str]) -> Callable[[str], Any]:
    """Numbers by size, words in the order given."""
    try:
        numbers = {v: float(v) for v in levels}
    except ValueError:
        return levels.index
    return numbers.__getitem__


def _partners(factor: str, tests: list[effects.Test], adjusted: Any) -> list[str]:
    strong = [
        t.term for t, p in zip(tests, adjusted, strict=True) if len(t.term) == 2 and factor in t.term and p < ALPHA
    ]
    return [b if a == factor else a for a, b in strong]


def _level_effects(
    d: Design,
    y: Any,
    factor: str,
    partners: list[str],
    levels: dict[str, list[str]],
    rows: pl.DataFrame,
    judged_on: tuple[str, float],
) -> list[tuple[dict[str, Any], Located]]:
    out = []
    endpoint, margin = judged_on
    run_ids, seeds = rows["run_id"].to_list(), rows["seed"].to_numpy()
    late = _late(rows, endpoint)
    combinations = list(itertools.product(*(range(len(levels[p])) for p in partners)))
    for combination in combinations[:COMBINATIONS]:
        at = dict(zip(partners, combination, strict=True))
        mask = np.ones(rows.height, dtype=bool)
        for p, k in at.items():
            mask &= d.codes[p] == k
        used = np.unique(seeds[mask]).tolist()
        for level in range(1, len(levels[factor])):
            condition = {p: levels[p][k] for p, k in at.items()}
            pair = mask & np.isin(d.codes[factor], (0, level))
            ids = [run_ids[i] for i in np.flatnonzero(pair)]
            record = {
                "kind": "simple_effect" if partners else "main_effect",
                "factor": factor,
                "level": levels[factor][level],
                "base_level": levels[factor][0],
                "at": condition,
                "claim": "differs",
                "endpoint": endpoint,
                "margin": margin,
                "unit": unit_of(endpoint),
                "seeds": used,
                "run_ids": ids,
            }
            by_seed = _paired_by_seed(d, y, factor, level, mask)
            if len(by_seed) < 2 and not partners:  # a fraction has no two cells that differ in this factor alone
                by_seed = effects.level_by_seed(d, y, factor, level)
            if len(by_seed) >= 2:
                n = len(by_seed)
                share = [float(late[pair & (d.codes[factor] == k)].mean()) for k in (level, 0)]
                cost = max(float(tails.late_cost(endpoint, x, n, z, n)) for x, z in (share, share[::-1]))
                named = [(rows["arm"][i], int(seeds[i])) for i in np.flatnonzero(pair & late).tolist()]
                record |= {"n": n, "paired": True, "notes": tails.notes(endpoint, n, margin, cost)}
                record |= tails.beside(endpoint, by_seed, named)
                tail = tails.heavy(endpoint) is not None
                out.append((record, tails.locate(list(by_seed.values()), margin, tail=tail, cost=cost)))
    return out


def _late(rows: pl.DataFrame, endpoint: str) -> Any:
    """Return, for every row, whether it is an outlying run of its arm."""
    values: dict[str, dict[int, float]] = {}
    for arm, seed, value in rows.select("arm", "seed", endpoint).iter_rows():
        values.setdefault(arm, {})[seed] = value
    found = {(arm, seed) for arm, own in values.items() for seed in tails.outlying(endpoint, own)}
    return np.array([key in found for key in rows.select("arm", "seed").iter_rows()], dtype=bool)


def _paired_by_seed(d: Design, y: Any, factor: str, level: int, mask: Any) -> dict[int, float]:
    """Return, by seed, level minus base level within each cell of the other factors, averaged over cells."""
    others = [f for f in d.codes if f not in {factor, "seed"}]
    value: dict[tuple[int, ...], dict[int, float]] = {}
    for i in np.flatnonzero(mask & np.isin(d.codes[factor], (0, level))):
        cell = (int(d.codes["seed"][i]), *(int(d.codes[f][i]) for f in others))
        value.setdefault(cell, {})[int(d.codes[factor][i])] = float(y[i])
    differences: dict[int, list[float]] = {}
    for cell, by_level in value.items():
        if level in by_level and 0 in by_level:
            differences.setdefault(cell[0], []).append(by_level[level] - by_level[0])
    return {seed: float(np.mean(v)) for seed, v in differences.items()}


def _judged(family: list[dict[str, Any]], located: list[Located]) -> list[dict[str, Any]]:
    if not family:
        return []
    tests = contrasts.Tests(*(np.array([getattr(x, f) for x in located]) for f in ("effect", "p", "within", "beyond")))
    judged = contrasts.judge(tests, ["differs"] * len(family), "bh")
    out = []
    for i, (record, place) in enumerate(zip(family, located, strict=True)):
        condition = ", ".join(f"{_short(k)} {v}" for k, v in record["at"].items())
        name = _short(record["factor"])
        full = record | {
            "id": f"factors/{record['factor']}={record['level']}/{condition}/{record['endpoint']}",
            "family": "factors",
            "family_size": len(family),
            "adjustment": "bh",
            "arm_label": f"{name} {record['level']}" + (f" (where {condition})" if condition else ""),
            "reference_label": f"{name} {record['base_level']}",
            "verdict": verdict(judged, i),
            "below_margin": bool(judged.below_margin[i]),
            "reasons": [],
            "effect": float(place.effect),
            "interval": [float(place.low), float(place.high)],
            "sd": float(place.sd),
            "p": float(judged.p[i]),
            "p_adjusted": float(judged.p_adjusted[i]),
            "p_sign_flip": None,
            "p_within_margin": float(judged.p_within[i]),
            "detectable": None,
        }
        out.append(full)
    return out


def _short(factor: str) -> str:
    return factor.partition(".")[2].replace("_", " ")
