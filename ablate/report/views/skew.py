"""Gradient skew of nodes against the asymmetry of their activation."""

from __future__ import annotations

import json

import numpy as np
import polars as pl

from ablate.kernels.spec import TRAITS
from ablate.report.context import Context
from ablate.report.draw import few_ticks, legend, mark
from ablate.report.parts import Table, View
from ablate.report.style import new
from ablate.report.tables import absent, columns


def skew(c: Context) -> View:
    """Show gradient skew of nodes against the nominal asymmetry of the arm's activation, and against router offset."""
    view = View(
        "skew",
        "Gradient skew against activation asymmetry",
        "Do asymmetric activations push nodes to one side, and less so once the nonlinearity sits after the sum?",
    )
    points = []
    for arm, u in c.usage.items():
        values = np.abs(u.skew[-1][np.isfinite(u.skew[-1])])
        if len(values):
            points.append(
                (arm, _asymmetry(c, arm), float(values.mean()), float(np.nanmean(np.abs(u.offset[-1]))), len(values))
            )
    if not points:
        view.missing = absent(c, "No gradient skew in the usage table (nodes must contribute and see 30 tokens a side)")
        return view
    rows = [
        {"arm": c.labels[a], "asymmetry": g, "skew": s, "offset": o, "nodes": n, "runs": [c.usage[a].run_id]}
        for a, g, s, o, n in points
    ]
    head = columns(
        asymmetry=(
            "nominal asymmetry G",
            ".2f",
            "of the node activation: ReLU 1, GELU .69, SiLU .59, mirror ±1 and tanh 0",
        ),
        skew=("mean |skew|", ".3f"),
        offset=("router offset", ".3f"),
        nodes=("nodes", "d"),
        n=None,
    )
    view.tables.append(Table("skew", "Nodes with known skew at the end of training, first seed", head, rows))
    figure = new(7.2, 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    for a, g, s, o, _ in points:
        if g is not None:
            left.plot(g, s, linestyle="none", markersize=7, **mark(c.styles.arms[a]))
        right.plot(o, s, linestyle="none", markersize=7, **mark(c.styles.arms[a]))
    left.set_xlabel("nominal gradient asymmetry G")
    left.set_xlim(-0.05, 1.05)
    left.set_ylabel("mean absolute gradient skew")
    left.set_ylim(0, 1.15 * max(s for _, _, s, _, _ in points))
    few_ticks(right)
    right.set_xlabel("mean router offset")
    legend(figure, c.styles, columns=3, controls=False)
    view.figures.append(("skew", "Skew of node gradients at the end of training, an arm a mark", figure))
    view.reading = [
        "Placement is part of the mark: compare `unit` (before the sum) with `tree` and `sum` (after it) at equal asymmetry.",
        c.choice,
    ]
    view.reading = [t for t in view.reading if t]
    return view


def _asymmetry(c: Context, arm: str) -> float | None:
    """Return nominal G of an arm's nodes where it is tabulated (mirror 0, or an odd or even curve); None in between."""
    config = next(iter(c.tables.trials.filter(pl.col("arm") == arm)["config"].drop_nulls()), None)
    tree = (json.loads(config).get("tree") or {}) if config else {}
    s = tree.get("mirror", 0.0) if tree.get("node_mirror") is None else tree["node_mirror"]
    if s in (1, -1):
        return 0.0
    return TRAITS[tree.get("activation", "gelu")].asymmetry if s == 0 else None
