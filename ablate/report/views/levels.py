"""Entropy that each tree level loses."""

from __future__ import annotations

import numpy as np
import polars as pl

from ablate.balance.metrics import bits_lost_by_level
from ablate.report.context import Context
from ablate.report.draw import legend, mark, plain, plotly_mark
from ablate.report.parts import View
from ablate.report.style import DASHES, PLOTLY_DASHES, new
from ablate.report.tables import needs


def levels(c: Context) -> View:
    """Show the entropy that each tree level loses."""
    view = View("levels", "Entropy lost per tree level", "Is balance lost near the root or near the leaves?")
    view.missing = needs(c, "usage")
    if view.missing:
        return view
    shown = [a for a in c.shown if a in c.usage and c.usage[a].depth > 0]
    figure = new(7.2, 4.2)
    first, last = figure.subplots(1, 2, sharey=True)
    traces, rows = [], []
    for arm in shown:
        u, style = c.usage[arm], c.styles.arms[arm]
        for ax, s in ((first, 0), (last, -1)):
            lost = bits_lost_by_level(u.leaves[s])
            mean = np.nanmean(lost, axis=(0, 1))
            x = list(range(len(mean)))
            ax.plot(x, mean, linestyle=DASHES[style.dash], linewidth=1.3, markersize=5, **mark(style))
            worst = lost.reshape(-1, lost.shape[-1])[int(np.nanargmax(np.nansum(lost, axis=-1).ravel()))]
            rows += [
                {
                    "arm": arm,
                    "seed": u.seed,
                    "trial": u.trial,
                    "step": u.steps[s],
                    "level": d,
                    "bits_lost": float(mean[d]),
                    "bits_lost_worst_tree": float(worst[d]),
                }
                for d in x
            ]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(c.labels[arm]),
                "x": x,
                "y": mean.tolist(),
                "marker": plotly_mark(style, 7),
                "line": {"color": style.colour, "dash": PLOTLY_DASHES[style.dash]},
                "hovertemplate": "level %{x}: %{y:.4f}<extra>" + plain(c.labels[arm]) + "</extra>",
            }
        )
    view.data["levels"] = pl.DataFrame(rows)
    first.set_title("step 0")
    last.set_title("end of training")
    first.set_ylabel("bits_lost of the level (they sum to the tree's)")
    for ax in (first, last):
        ax.set_xlabel("level (0: the root)")
        ax.set_xticks(range(max(c.usage[a].depth for a in shown)))
        ax.set_ylim(bottom=0)
    legend(figure, c.styles, lines=True, columns=3, controls=False)
    view.figures.append(("levels", "Where entropy is lost, mean over layers and trees of the first seed", figure))
    layout = {
        "xaxis": {"title": {"text": "level (0: the root), end of training"}, "dtick": 1},
        "yaxis": {"title": {"text": "bits_lost of the level"}, "rangemode": "tozero"},
        "height": 480,
    }
    view.plots.append(("levels", {"data": traces, "layout": layout}))
    ends = {a: np.nanmean(bits_lost_by_level(c.usage[a].leaves[-1]), axis=(0, 1)) for a in shown}
    view.reading = [
        f"{c.labels[a]}: level {int(np.argmax(v))} loses most ({v.max():.3f} of {v.sum():.3f} in all)."
        for a, v in list(ends.items())[:8]
    ] + ([c.choice] if c.choice else [])
    return view
