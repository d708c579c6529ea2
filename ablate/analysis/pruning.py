"""What removing paths costs, as findings: dead subtrees against the whole model, and against as many other units."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.analysis.frames import Tables
from ablate.analysis.verdicts import Comparison, Runs, findings

WHOLE, DEAD = "whole", "dead"
OTHERS = {"random": "about as many units at random", "magnitude": "about as many units of smallest norm"}
"""The other methods of prune.parquet, in words."""


def pruning(tables: Tables, labels: dict[str, str], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Per arm and threshold, records like findings on the bpb of the same trained runs before and after removal.

    Three claims: bpb without dead subtrees matches that of the whole model within the study's margin, and is lower than
    without as many units at random, and of smallest norm. Adjusted as one family (Benjamini-Hochberg); empty where no run
    was pruned.
    """
    if tables.prune is None:
        return []
    rows = tables.prune.filter(pl.col("kind") != "tune")  # tuning seeds take no part in comparisons
    if rows.is_empty():
        return []
    quality = tables.study.quality
    runs, names = Runs({}, {}, {}, {}), dict(labels)
    shares: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in rows.sort("arm", "threshold", "method", "seed").iter_rows(named=True):
        arm, seed, share = row["arm"], row["seed"], row["threshold"]
        label = labels.get(arm, arm)
        key = _key(arm, row["method"], share)
        reached = f"at most {share:.3g} of a tree's tokens reach" if share else "no token reaches"
        names[key] = f"{label} without {OTHERS.get(row['method'], f'subtrees that {reached}')}"
        whole = _key(arm, WHOLE, share)  # one a threshold: each was pruned and scored on its own
        names[whole] = f"{label}, whole"
        for name, bpb in ((key, row["bpb_after"]), (whole, row["bpb_before"])):
            runs.values.setdefault((name, quality.name), {})[seed] = bpb
            runs.run_ids[name, seed] = row["run_id"]
        shares.setdefault((arm, share), {}).setdefault(row["method"], []).append(row["removed_frac"])
    compared: list[Comparison] = []
    about: list[dict[str, Any]] = []
    for (arm, share), removed in shares.items():
        dead = _key(arm, DEAD, share)
        compared.append(Comparison(dead, _key(arm, WHOLE, share), quality.name, "matches", tables.study.margin))
        compared += [
            Comparison(dead, _key(arm, method, share), quality.name, quality.better, tables.study.margin)
            for method in removed
            if method != DEAD
        ]
        about += [{"of": arm, "threshold": share, "removed_frac": float(np.mean(removed[DEAD]))}] * len(removed)
    found = findings(compared, runs, names, family="pruning", method="bh", rng=rng, same_runs=True)
    once = [{"kind": "pruning", "run_ids": list(dict.fromkeys(f["run_ids"]))} for f in found]
    return [f | kept | more for f, kept, more in zip(found, once, about, strict=True)]


def _key(arm: str, method: str, share: float) -> str:
    return f"{arm}/{method}/{share!r}"
