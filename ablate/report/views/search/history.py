"""Optimisation history: what each candidate reached, and the best so far."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.config.endpoints import label_of
from ablate.report.context import Context
from ablate.report.draw import cut_poor_end, few_ticks, mark
from ablate.report.parts import View
from ablate.report.style import COLOURS, INK, MUTED, new
from ablate.report.views.search.words import axis, nothing, objectives, sound


def history(c: Context) -> View:
    """Racing means in the order in which candidates were started, with the best so far; the hypervolume for two."""
    view = View("search_history", "Optimisation history", "Had the search still been getting better when it ended?")
    rows = c.findings["search"]["history"]
    means = {r["arm"]: r["racing"] for r in sound(c)}
    known = objectives(c)
    if not means:
        view.missing = nothing(c)
        return view
    volume = any(r["hypervolume"] is not None for r in rows)
    figure = new(7.2, 1.9 * (len(known) + volume) + 0.5)
    axes = figure.subplots(len(known) + volume, 1, sharex=True, squeeze=False)[:, 0]
    x = list(range(1, len(rows) + 1))
    for ax, o in zip(axes, known, strict=False):
        at = [i for i, r in zip(x, rows, strict=True) if r["arm"] in means]
        y = [means[r["arm"]][o]["mean"] for r in rows if r["arm"] in means]
        ax.plot(at, y, ".", color=MUTED, markersize=5, alpha=0.7)
        for r in (r for r in sound(c) if r["arm"] in c.leading):
            place = next(i for i, h in zip(x, rows, strict=True) if h["arm"] == r["arm"])
            ax.plot(place, r["racing"][o]["mean"], linestyle="none", markersize=6, **mark(c.styles.arms[r["arm"]]))
        ax.step(x, [r["best"].get(o, np.nan) for r in rows], where="post", color=COLOURS[0], linewidth=1.6)
        ax.set_ylabel(label_of(o) if len(known) > 1 else axis(c, o))
        if o == c.quality.name:
            cut_poor_end(ax, y, c.quality.sign)
    if volume:
        axes[-1].step(x, [r["hypervolume"] or np.nan for r in rows], where="post", color=INK, linewidth=1.4)
        axes[-1].set_ylabel("hypervolume")
    axes[-1].set_xlabel("candidates started")
    few_ticks(*axes, count=8)
    view.figures.append(("search_history", "Dots: racing means of the candidates; line: the best so far", figure))
    view.plots.append(("search_history", _plot(c, rows, means, known[0])))
    for o in known:
        place, first = next((i, r) for i, r in zip(x, rows, strict=True) if r["best"].get(o) == rows[-1]["best"][o])
        view.reading.append(
            f"The best {o} was reached by {first['arm']}, after {first['runs']} of {rows[-1]['runs']} training runs "
            f"({place} of {len(rows)} candidates)."
        )
    view.reading.append("The best of many noisy means is better than it deserves; fresh seeds correct that.")
    if volume:
        corner = ", ".join(f"{o['objective']} {o['worst']:.3g}" for o in c.findings["search"]["objectives"])
        view.reading.append(
            f"Hypervolume: the area between a poor corner ({corner}) and the front. It grows whenever the front gets better."
        )
    view.data["search_history"] = pl.DataFrame(
        [{"arm": r["arm"], "runs": r["runs"], **r["best"], "hypervolume": r["hypervolume"]} for r in rows],
        infer_schema_length=None,
    )
    return view


def _plot(c: Context, rows: list[dict[str, Any]], means: dict[str, Any], objective: str) -> dict[str, Any]:
    ended = [(i, r["arm"]) for i, r in enumerate(rows, 1) if r["arm"] in means]
    best = [(i, r["best"][objective]) for i, r in enumerate(rows, 1) if objective in r["best"]]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "candidates",
            "x": [i for i, _ in ended],
            "y": [means[a][objective]["mean"] for _, a in ended],
            "text": [f"{a}, n {means[a][objective]['n']}" for _, a in ended],
            "marker": {"color": MUTED, "size": 6},
            "hovertemplate": "%{text}: %{y:.4f}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [i for i, _ in best],
            "y": [v for _, v in best],
            "line": {"color": COLOURS[0], "shape": "hv"},
            "hovertemplate": "best of %{x}: %{y:.4f}<extra></extra>",
        },
    ]
    layout = {"xaxis": {"title": {"text": "candidates started"}}, "yaxis": {"title": {"text": axis(c, objective)}}}
    return {"data": data, "layout": layout | {"height": 420}}
