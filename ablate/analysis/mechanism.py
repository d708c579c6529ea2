"""The mechanism: who moves nodes to one side, and does gradient skew foretell it? From motion and usage tables.

Sums over nodes are weighted by the probe tokens that reached each node, so that router and drift add up to the change;
pushes are in units of the margin's standard deviation. Trials of one arm are averaged with their seed as the unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.analysis import contrasts
from ablate.analysis.frames import Tables
from ablate.balance import mechanism as skew
from ablate.balance.metrics import MIN_SIDE

FACTOR = "tree.node_backward"
EVALUATIONS = (0, 1, -1)
"""Places, in a trial's order, of the evaluations whose usage `prediction` reads: it goes from the second to the last, and
the first says which is the second."""
MEASURES = ("right_excess", "imbalance", "router_right", "drift_right", "router_fuller", "drift_fuller")
"""right_excess: mean of 2r - 1; imbalance: of |2r - 1|, r the share that goes right. *_right: how far router and drift
moved nodes towards the right side since the evaluation before; *_fuller: towards the side that was fuller."""


def mechanism(tables: Tables, frame: pl.DataFrame, found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What changing the backward pass alone did, from the outcomes `frame` and the study's findings; None without it.

    `verdict` is supported where every named contrast between arms that differ in the backward pass, on dead leaves and
    with a direction, is supported; refuted where one is refuted; else inconclusive.
    """
    if not applies(tables):
        return None
    rests_on = [f for f in found if f["family"] == "confirm" and _backward(tables, f)]
    verdicts = {f["verdict"] for f in rests_on}
    verdict = "inconclusive"
    if "refuted" in verdicts:
        verdict = "refuted"
    elif verdicts == {"supported"}:
        verdict = "supported"
    return {
        "verdict": verdict,
        "rests_on": [f["id"] for f in rests_on],
        "pushes": pushes(tables, frame),
        "prediction": [p for arm in _arms(frame) if (p := prediction(tables, frame, arm))],
    }


def applies(tables: Tables) -> bool:
    """Return whether the study varies the backward pass of the nodes."""
    return FACTOR in tables.factors


def _backward(tables: Tables, f: dict[str, Any]) -> bool:
    """Whether a finding compares two arms whose forward pass is one, with a direction, on dead leaves."""
    arms = [dict(tables.study.arms.get(f[side], {})) for side in ("arm", "reference")]
    slopes = [arm.pop(FACTOR, "own") for arm in arms]
    directed = f["endpoint"] == "dead_frac" and f["claim"] in {"lower", "higher"}
    return directed and arms[0] == arms[1] and slopes[0] != slopes[1]


def _arms(frame: pl.DataFrame) -> list[str]:
    return frame["arm"].unique(maintain_order=True).to_list()


def pushes(tables: Tables, frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Per arm and evaluation: every one of MEASURES, mean over seeds with its 95% t interval."""
    if tables.motion is None:
        return []
    means = per_trial(tables.motion.filter(pl.col("trial").is_in(frame["trial"].to_list())))
    ids = dict(frame.select("trial", "run_id").iter_rows())
    out = []
    for arm in _arms(frame):
        mine = means.filter(pl.col("arm") == arm).sort("step", "seed")
        for key, rows in mine.partition_by("step", as_dict=True, maintain_order=True).items():
            record: dict[str, Any] = {"arm": arm, "step": key[0], "since": rows["since"][0], "n": rows.height}
            for name in MEASURES:
                values = rows[name].to_numpy()
                e = contrasts.paired(values) if len(values) > 1 else None
                record[name] = {
                    "mean": float(values.mean()),
                    "interval": [float(e.low), float(e.high)] if e else None,
                }
            out.append(record | {"run_ids": [ids[t] for t in rows["trial"]]})
    return out


def per_trial(motion: pl.LazyFrame) -> pl.DataFrame:
    """One row a trial and evaluation with MEASURES, over nodes that 2·MIN_SIDE probe tokens reached and that spread."""
    side = (pl.col("right") - 0.5).sign()
    weight, spread = pl.col("tokens"), (pl.col("tokens") * pl.col("sd")).sum()
    excess = 2 * pl.col("right_after") - 1

    def mean(value: pl.Expr) -> pl.Expr:
        return (weight * value).sum() / weight.sum()

    return (
        motion.filter((pl.col("tokens") >= 2 * MIN_SIDE) & (pl.col("sd") > 0))
        .group_by("arm", "seed", "trial", "since", "step", maintain_order=True)
        .agg(
            right_excess=mean(excess),
            imbalance=mean(excess.abs()),
            router_right=(weight * pl.col("router")).sum() / spread,
            drift_right=(weight * pl.col("drift")).sum() / spread,
            router_fuller=(weight * side * pl.col("router")).sum() / spread,
            drift_fuller=(weight * side * pl.col("drift")).sum() / spread,
        )
        .collect()
    )


def prediction(tables: Tables, frame: pl.DataFrame, arm: str) -> dict[str, Any] | None:
    """Whether skew at the first evaluation after the start foretells lost sides, beyond share, traffic, level and offset.

    Gain in area under the ROC curve on each held-out seed; None without usage, nodes, or seeds enough to hold one out.
    """
    if tables.usage is None:
        return None
    rows = []
    for trial, seed in frame.filter(pl.col("arm") == arm).select("trial", "seed").iter_rows():
        usage = tables.usage.filter((pl.col("trial") == trial) & (pl.col("window") == "held_out")).collect()
        steps = sorted(usage["step"].unique().to_list())
        if len(steps) >= 3:
            rows.append(skew.side_rows(usage, seed, step=steps[EVALUATIONS[1]]))
    try:
        p = skew.predict(pl.concat(rows)) if rows else None
    except ValueError:
        return None
    if p is None:
        return None
    return {
        "arm": arm,
        "n": len(p.seeds),
        "auc": float(np.mean(p.auc_base)),
        "auc_with_skew": float(np.mean(p.auc_skew)),
        "gain": p.gain,
        "interval": list(p.interval),
        "p": p.p,
        "coefficient": p.coefficient,
        "coefficient_error": p.coefficient_error,
        "sides": p.rows,
        "lost": p.lost,
    }
