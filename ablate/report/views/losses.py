"""Loss curves of every arm, and how each depends on the learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import few_ticks, legend, mark, plain, plotly_mark
from ablate.report.parts import Table, View
from ablate.report.style import DASHES, PLOTLY_DASHES, ArmStyle, new
from ablate.report.tables import absent, columns


def losses(c: Context) -> View:
    """Show loss curves of every arm, and how each depends on the learning rate."""
    view = View(
        "loss", "Loss curves and learning rates", "Was every arm trained to its end, at a learning rate that suits it?"
    )
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
    _rates(c, view)
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


def _rates(c: Context, view: View) -> None:
    records = [r for r in c.findings["learning_rates"] if r["best"] is not None]
    if not records and c.findings["design"] == "search":
        found = "train.lr" in c.tables.study.factors
        view.reading.append(
            "The learning rate was searched with the other settings."
            if found
            else "One learning rate for all candidates; a difference may be one of tuning. Give the search the factor `train.lr`."
        )
        return
    if not records:
        view.reading.append(
            "Learning rates were not tuned per arm; a difference may be one of tuning. Give the study a `tune:` section "
            "(three rates or more) and run `ablate study run` again."
        )
        return
    edge = [c.labels.get(r["arm"], r["arm"]) for r in records if not r["interior"]]
    view.reading.append(
        "Every arm's best learning rate lies inside those tried."
        if not edge
        else f"Best rate at the edge of those tried, so perhaps not the best there is: {', '.join(edge)}."
    )
    of = c.quality
    rows = [
        {
            "arm": c.labels.get(r["arm"], r["arm"]),
            "best": r["best"],
            "interior": "yes" if r["interior"] else "no",
            "rates": "; ".join(
                f"{x['lr']:g}: {'diverged' if x[of.name] is None else format(x[of.name], of.form)}" for x in r["rates"]
            ),
            "best_of": "; ".join(format(v, of.form) for v in r["best_of_n"]),
            "runs": r["run_ids"],
        }
        for r in records
    ]
    head = columns(
        best=("best rate", ".3g"),
        interior="interior",
        rates=f"{of.short} at each rate",
        best_of="expected best of 1, 2, … rates",
        n=None,
    )
    view.tables.append(Table("learning_rates", "Learning rates tried, on tuning seeds of their own", head, rows))
    _sensitivity(c, view, records)


def _sensitivity(c: Context, view: View, records: list[dict[str, Any]]) -> None:
    """Quality at each rate, and the expected best of n rates."""
    q = c.quality.name
    figure = new(6.6, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for r in [r for r in records if r["arm"] in c.shown or len(records) <= 16]:
        style = c.styles.arms.get(r["arm"])
        if style is None:
            continue
        known = [x for x in r["rates"] if x[q] is not None]
        look: dict[str, Any] = {"linestyle": DASHES[style.dash], "linewidth": 1.2, "markersize": 5, **mark(style)}
        left.plot([x["lr"] for x in known], [x[q] for x in known], **look)
        right.plot(range(1, len(r["best_of_n"]) + 1), r["best_of_n"], **look)
    left.set_xscale("log")
    rates = sorted({x["lr"] for r in records for x in r["rates"]})
    left.set_xticks(rates, [f"{v:g}" for v in rates])
    left.minorticks_off()
    left.set_xlabel("learning rate")
    left.set_ylabel(c.quality.label)
    right.set_xlabel("rates tried")
    right.set_title("expected best of n")
    right.set_xticks(range(1, max(len(r["best_of_n"]) for r in records) + 1))
    legend(figure, c.styles, lines=True, columns=3)
    view.figures.append(("learning_rates", "Sensitivity to the learning rate, and what tuning effort buys", figure))
