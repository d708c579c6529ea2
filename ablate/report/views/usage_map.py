"""Load of every leaf, layer by leaf."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import panels, strip, wrap
from ablate.report.parts import View
from ablate.report.style import DEAD, LOAD, MUTED
from ablate.report.tables import needs

FLOOR = -6.0  # log2 of load against an even load, as drawn


def usage_map(c: Context) -> View:
    """Show the load of every leaf against an even load, layer by leaf."""
    view = View("usage", "Where tokens go: layer by leaf", "Which leaves carry the load, in which layer?")
    view.missing = needs(c, "usage")
    if view.missing:
        return view
    shown = [a for a in c.shown if a in c.usage]
    figure, axes = panels(len(shown), width=2.35, height=1.65, share=False)
    image = None
    rows = []
    for ax, arm in zip(axes, shown, strict=True):
        u = c.usage[arm]
        load = log_load(u.leaves[-1])
        layers, trees, leaves = load.shape
        flat = load.reshape(layers * trees, leaves)
        colours = LOAD.with_extremes(bad=DEAD)
        masked = np.ma.masked_where(flat <= np.log2(0.01), flat)
        image = ax.imshow(masked, aspect="auto", cmap=colours, vmin=FLOOR, vmax=-FLOOR, interpolation="nearest")
        strip(ax)
        ax.set_title(wrap(f"{c.labels[arm]} (seed {u.seed})", 34))
        ax.set_yticks([trees * i + (trees - 1) / 2 for i in range(layers)], [str(i) for i in range(layers)])
        for i in range(1, layers):
            ax.axhline(trees * i - 0.5, color=MUTED, linewidth=0.6)
        ax.set_xticks([0, leaves - 1], ["0", str(leaves - 1)])
        for layer, tree in np.ndindex(layers, trees):
            rows.append(
                {
                    "arm": arm,
                    "seed": u.seed,
                    "trial": u.trial,
                    "step": u.steps[-1],
                    "layer": layer,
                    "tree": tree,
                    "counts": " ".join(str(v) for v in u.leaves[-1, layer, tree]),
                }
            )
    view.data["usage_map"] = pl.DataFrame(rows)
    if image is not None:
        bar = figure.colorbar(
            image, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02, ticks=[-6, -4, -2, 0, 2, 4, 6]
        )
        bar.ax.set_xticklabels(["1/64", "1/16", "1/4", "even", "4×", "16×", "64×"])
        bar.set_label("tokens against an even share (black: dead, under 1/100)")
        bar.outline.set_visible(False)
    figure.supxlabel("leaf, left to right", fontsize=9)
    figure.supylabel("layer (a row a tree)", fontsize=9)
    view.figures.append(
        (
            "usage",
            "Leaf loads at the end of training, first seed of each arm; layers from top to bottom, a row a tree",
            figure,
        )
    )
    view.widgets.append(("usage", usage_data(c, shown)))
    view.reading = [
        t for t in ["A row is one tree, never an average of trees; one seed an arm, the first.", c.choice] if t
    ]
    return view


def log_load(counts: Any) -> Any:
    """Return log2 of each leaf's load against an even load; -20 where no token came. Counts [..., L]."""
    total = counts.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        load = np.log2(counts * counts.shape[-1] / total)
    return np.nan_to_num(np.maximum(load, -20.0), nan=-20.0)


def usage_data(c: Context, shown: list[str]) -> dict[str, Any]:
    """Return loads of every evaluation as bytes, for the slider: 0 no token, else 1 + 254 steps of log2 load from -8 to 8."""
    out: dict[str, Any] = {"arms": []}
    for arm in shown:
        u = c.usage[arm]
        load = log_load(u.leaves)
        code = np.where(load <= -20, 0, 1 + np.round((np.clip(load, -8, 8) + 8) / 16 * 254)).astype(np.uint8)
        out["arms"].append(
            {
                "name": c.labels[arm],
                "seed": u.seed,
                "run": u.run_id,
                "steps": u.steps,
                "shape": list(code.shape),
                "load": base64.b64encode(code.tobytes()).decode(),
            }
        )
    return out
