"""Capacity: what layers of task facts store as the number of facts grows, one curve for arms that differ in nothing else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from itertools import pairwise
from statistics import fmean
from typing import Any

import polars as pl

from ablate.analysis.frames import Tables
from ablate.config.endpoints import ACCURACY, KBIT_STORED

HALF = 0.5
"""Accuracy at which a layer is said to hold half of the facts."""


def capacity(tables: Tables, frame: pl.DataFrame, names: dict[str, str]) -> list[dict[str, Any]]:
    """Return a curve for each group of arms that differ in task.facts alone; empty where no arm varies it.

    `frame` has the runs that count, `names` the arms' reading names. Each curve has `points` (fewest facts first) with means
    over seeds and the range of kbit stored, and `half`: the number of facts at which accuracy falls to one half, in
    each seed by interpolation over log N, with its mean and range. It is null where no seed's curve passes one half.
    """
    if tables.study.task != "facts":
        return []
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in frame.filter(pl.col(KBIT_STORED.name).is_not_null()).iter_rows(named=True):
        config = json.loads(run["config"])
        count = config["task"].pop("facts")
        kept = {k: v for k, v in config.items() if k not in ("init_seed", "data_seed")}
        kept["train"] = {k: v for k, v in kept["train"].items() if k != "lr"}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append({**run, "facts": count})
    curves = [_curve(runs, names, tables.study.arms) for runs in groups.values() if len({r["facts"] for r in runs}) > 1]
    return sorted(curves, key=lambda curve: "reference" not in curve["arms"])


def _curve(runs: list[dict[str, Any]], names: dict[str, str], own: Collection[str]) -> dict[str, Any]:
    """One curve; its name is what the names of those of its arms that the study file names begin with."""
    points = [_point([r for r in runs if r["facts"] == n], n) for n in sorted({r["facts"] for r in runs})]
    arms = list(dict.fromkeys(p["arm"] for p in points))
    by_seed = {
        s: sorted((r["facts"], r[ACCURACY.name]) for r in runs if r["seed"] == s) for s in {r["seed"] for r in runs}
    }
    halves = [h for s in sorted(by_seed) if (h := _half(by_seed[s])) is not None]
    half = {"mean": fmean(halves), "low": min(halves), "high": max(halves), "n": len(halves)} if halves else None
    named = [names.get(a, a) for a in arms if a in own] or arms  # the reference or a control may be one point of it
    return {"curve": _shared(named), "arms": arms, "points": points, "half": half}


def _point(runs: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Means over the runs of one arm."""
    stored = [r[KBIT_STORED.name] for r in runs]
    balance = [r["n_eff_frac"] for r in runs if r["n_eff_frac"] is not None]
    return {
        "arm": runs[0]["arm"],
        "facts": count,
        KBIT_STORED.name: fmean(stored),
        "low": min(stored),
        "high": max(stored),
        ACCURACY.name: fmean(r[ACCURACY.name] for r in runs),
        "bits_per_unit": 1000 * fmean(stored) / runs[0]["total_units"],
        "n_eff_frac": fmean(balance) if balance else None,
        "n": len(runs),
        "run_ids": [r["run_id"] for r in runs],
    }


def _half(points: list[tuple[int, float]]) -> float | None:
    """The number of facts at which accuracy first falls through HALF; None where it never does."""
    for (few, above), (many, below) in pairwise(points):
        if above >= HALF > below:
            share = (above - HALF) / (above - below)
            return math.exp(math.log(few) + share * (math.log(many) - math.log(few)))
    return None


def _shared(labels: list[str]) -> str:
    """What the names of a curve's arms begin with, without a number of facts that they share the first digits of."""
    alike = [len(set(letters)) == 1 for letters in zip(*labels, strict=False)]
    shared = labels[0][: alike.index(False) if False in alike else len(alike)]
    return re.sub(r"[\s,;:·(=]*(N|facts)?[\s=]*\d*$", "", shared).strip() or labels[0]
