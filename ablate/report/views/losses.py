"""Loss curves of every arm."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import few_ticks, legend, mark, plain, plotly_mark
from ablate.report.parts import View
from ablate.report.style import DASHES, PLOTLY_DASHES, ArmStyle, new
from ablate.report.tables import absent


def losses(c: Context) -> View:
    """Show loss curves of every arm."""
    view = View("loss", "Loss curves", "Was every arm trained to its end?")
    q = c.quality.name
    history = c.history.filter(pl.col(q).is_not_null() & (pl.col("step") > 0))
    present = set(history["arm"].unique())
    arms = [a for a in c.order if a in present and (a in c.shown or c.kinds[a] == "control")]
    if not arms:
        view.missing = absent(c, "No evaluation after step 0")
        return view
    value = pl.col(q)
    means = (
        history.filter(pl.col("arm").is_in(arms))
        .group_by("arm", "step")
        .agg(value.mean(), value.min().alias("low"), value.max().alias("high"), pl.len().alias("n"))
        .sort("arm", "step")
    )
    view.data["loss_curves"] = means
    _curves(c, view, arms, means)
    if c.findings["reference"] in arms:
        _differences(c, view, arms, means)
    if c.choice:
        view.reading.append(c.choice)
    return view


def _line(style: ArmStyle) -> dict[str, Any]:
    return {"linestyle": DASHES[style.dash], "linewidth": 1.3, "markersize": 3.5, **mark(style)}


def _curves(c: Context, view: View, arms: list[str], means: pl.DataFrame) -> None:
    """Means over seeds with their range, without the steep start, and the same for the page."""
    q, sign = c.quality.name, c.quality.sign
    figure = new(7.2, 4.4)
    ax = figure.subplots()
    traces = []
    for arm in arms:
        part, style = means.filter(pl.col("arm") == arm), c.styles.arms[arm]
        ax.fill_between(part["step"], part["low"], part["high"], color=style.colour, alpha=0.12, linewidth=0)
        ax.plot(part["step"], part[q], **_line(style))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [*part["step"], *part["step"].reverse()],
                "y": [*part["high"], *part["low"].reverse()],
                "fill": "toself",
                "fillcolor": style.colour,
                "line": {"width": 0},
                "opacity": 0.12,
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(c.labels[arm]),
                "x": part["step"].to_list(),
                "y": part[q].to_list(),
                "line": {"color": style.colour, "dash": PLOTLY_DASHES[style.dash]},
                "marker": plotly_mark(style, 6),
                "hovertemplate": "step %{x}: %{y:.4f}<extra>" + plain(c.labels[arm]) + "</extra>",
            }
        )
    last = means.group_by("arm").agg(pl.col(q).last())[q].to_numpy()
    late = means.filter(pl.col("step") >= 0.4 * pl.col("step").max())
    poor = late["high" if sign > 0 else "low"].to_numpy()
    worst = sign * max(float(np.max(sign * poor)), float(np.max(sign * last)))
    best = sign * float((sign * last).min())
    limits = sorted((best - 0.05 * (worst - best), worst))
    ax.set_ylim(*limits)
    since = float(late["step"].to_numpy().min()) * 0.85
    ax.set_xlim(left=since)
    ax.set_ylabel(f"{c.quality.label} on the held-out slice")
    ax.set_xlabel("optimizer step")
    few_ticks(ax)
    legend(figure, c.styles, lines=True, columns=3)
    caption = "Means over seeds (band: lowest to highest); the steep start is cut off"
    view.figures.append(("loss_curves", caption, figure))
    layout = {
        "xaxis": {"title": {"text": "optimizer step"}, "range": [since, float(late["step"].to_numpy().max())]},
        "yaxis": {"title": {"text": c.quality.label}, "range": sorted((best - 0.02 * sign, worst))},
        "height": 520,
    }
    view.plots.append(("loss_curves", {"data": traces, "layout": layout}))


def _differences(c: Context, view: View, arms: list[str], means: pl.DataFrame) -> None:
    """The means minus those of the reference arm."""
    figure = new(7.2, 4.2)
    ax = figure.subplots()
    reference, q = c.findings["reference"], c.quality.name
    base = means.filter(pl.col("arm") == reference).select("step", base=q)
    for arm in arms:
        both = means.filter(pl.col("arm") == arm).join(base, on="step").sort("step")
        ax.plot(both["step"], both[q] - both["base"], **_line(c.styles.arms[arm]))
    few_ticks(ax)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(f"{c.quality.label}, minus {c.labels[reference]}")
    legend(figure, c.styles, lines=True, columns=3)
    view.figures.append(("loss_differences", "The same means minus those of the reference arm", figure))
