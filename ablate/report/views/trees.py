"""Trees drawn by traffic and gradient skew."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize

from ablate.report.context import Context, Usage
from ablate.report.draw import panels, plain, strip, wrap
from ablate.report.parts import View
from ablate.report.style import MUTED, SIGNED
from ablate.report.tables import needs

DRAWN_LEVELS = 6  # of a tree; deeper levels are folded into their ancestors


def tree_drawing(c: Context) -> View:
    """Draw the least balanced tree of each arm, edges by traffic and nodes by gradient skew."""
    view = View(
        "tree",
        "Trees by traffic and gradient skew",
        "At which node does a tree go wrong, and does the gradient push it there?",
    )
    view.missing = needs(c, "usage")
    if view.missing:
        return view
    shown = [a for a in c.shown if a in c.usage]
    figure, axes = panels(len(shown), width=2.35, height=1.75, share=False)
    known = False
    drawn = []
    for ax, arm in zip(axes, shown, strict=True):
        u = c.usage[arm]
        lost = 1 - _entropy_share(u.leaves[-1])
        layer, tree = (int(v) for v in np.unravel_index(np.argmax(lost), lost.shape))
        known |= _draw_tree(ax, u, layer, tree)
        ax.set_title(wrap(f"{c.labels[arm]}: layer {layer}, tree {tree}", 34))
        drawn.append(
            {
                "name": plain(c.labels[arm]),
                "run": u.run_id,
                "seed": u.seed,
                "layer": layer,
                "tree": tree,
                **_tree_data(u),
            }
        )
    norm = Normalize(-1, 1)
    bar = figure.colorbar(ScalarMappable(norm, SIGNED), ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("gradient skew of a node (grey: unknown); width of an edge: its share of tokens")
    bar.outline.set_visible(False)
    view.figures.append(("tree", "The least balanced tree of each arm at the end of training, first seed", figure))
    view.widgets.append(("tree", {"arms": drawn, "levels": DRAWN_LEVELS}))
    view.reading = [
        t
        for t in [
            ""
            if known
            else "Gradient skew was not measured for these trees (it needs 30 tokens a side and nodes that contribute).",
            "Positive skew: tokens sent right push harder on the node's weights than tokens sent left.",
            c.choice,
        ]
        if t
    ]
    return view


def _entropy_share(counts: Any) -> Any:
    total = counts.sum(-1, keepdims=True)
    p = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    h = -np.sum(p * np.log2(p, out=np.zeros(p.shape), where=p > 0), axis=-1)
    return h / max(1.0, np.log2(counts.shape[-1]))


def _heap(u: Usage, layer: int, tree: int, step: int = -1) -> Any:
    return np.concatenate([u.nodes[step, layer, tree], u.leaves[step, layer, tree]])


def _draw_tree(ax: Any, u: Usage, layer: int, tree: int) -> bool:
    levels = min(u.depth, DRAWN_LEVELS)
    counts = _heap(u, layer, tree).astype(float)
    share = counts / max(counts[0], 1.0)
    skew = u.skew[-1, layer, tree]
    below = np.arange(1, 2 ** (levels + 1) - 1)
    edges = LineCollection(
        [(_place((n - 1) // 2, levels), _place(n, levels)) for n in below.tolist()],
        colors=MUTED,
        linewidths=0.25 + 7 * share[below],
        capstyle="round",
        alpha=0.55,
        zorder=1,
    )
    ax.add_collection(edges)
    inner = np.arange(2**levels - 1)
    spots = np.array([_place(int(n), levels) for n in inner])
    colours = [SIGNED(0.5 + 0.5 * skew[n]) if np.isfinite(skew[n]) else "#b9bcc4" for n in inner]
    ax.scatter(
        spots[:, 0],
        spots[:, 1],
        s=6 + 60 * np.sqrt(share[inner]),
        c=colours,
        edgecolors=MUTED,
        linewidths=0.4,
        zorder=2,
    )
    strip(ax)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_ylim(-levels - 0.4, 0.5)
    return bool(np.isfinite(skew).any())


def _place(n: int, levels: int) -> tuple[float, float]:
    level = int(np.log2(n + 1))
    return (n + 1 - 2**level + 0.5) / 2**level * 2**levels, float(-level)


def _tree_data(u: Usage) -> dict[str, Any]:
    """Return shares of all trees' drawn levels and their skews as bytes, for the page's own drawing: last step only."""
    size = 2 ** (min(u.depth, DRAWN_LEVELS) + 1) - 1
    counts = np.concatenate([u.nodes[-1], u.leaves[-1]], axis=-1)[..., :size].astype(float)
    share = np.sqrt(counts / np.maximum(counts[..., :1], 1))
    skew = np.full(share.shape, np.nan)
    inner = min(size, u.skew.shape[-1])
    skew[..., :inner] = u.skew[-1][..., :inner]
    code = np.where(np.isfinite(skew), 1 + np.round((np.nan_to_num(np.clip(skew, -1, 1)) + 1) / 2 * 254), 0).astype(
        np.uint8
    )
    return {
        "shape": list(share.shape),
        "share": base64.b64encode(np.round(share * 255).astype(np.uint8).tobytes()).decode(),
        "skew": base64.b64encode(code.tobytes()).decode(),
    }
