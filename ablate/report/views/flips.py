"""Whether routing settles: flips and saturation."""

from __future__ import annotations

from typing import Any

import polars as pl

from ablate.report.context import Context
from ablate.report.draw import few_ticks, legend, mark, wrap
from ablate.report.parts import Table, View
from ablate.report.style import DASHES, new
from ablate.report.tables import absent, columns


def flips(c: Context) -> View:
    """Show how many tokens still change their leaf, and agreement with the end beyond chance."""
    view = View("flips", "Flips and saturation of routing", "Does routing settle, and when?")
    history = c.history.filter(pl.col("arm").is_in(c.shown))
    if not history["flip_rate"].count() and not history["saturation"].count():
        view.missing = absent(
            c,
            "No flip_rate or saturation in the history table (a study of two evaluations or more with trees has them)",
        )
        return view
    names = {
        "flip_rate": "share of tokens whose leaf changed since the evaluation before",
        "saturation": "agreement with the last evaluation beyond chance (κ)",
    }
    means = history.group_by("arm", "step").agg(
        *(pl.col(k).mean() for k in names),
        pl.col("flip_rate_worst").max(),
        pl.col("saturation_worst").min(),
        pl.col("seed").n_unique().alias("n"),
    )
    view.data["flips"] = means = means.sort("arm", "step")
    figure = new(7.2, 4.0)
    axes = figure.subplots(1, 2)
    for ax, key in zip(axes, names, strict=True):
        for arm in c.shown:
            part, style = means.filter((pl.col("arm") == arm) & pl.col(key).is_not_null()), c.styles.arms[arm]
            ax.plot(part["step"], part[key], linestyle=DASHES[style.dash], linewidth=1.3, markersize=4, **mark(style))
        ax.set_title(wrap(names[key], 40))
        ax.set_xlabel("optimizer step")
    axes[0].set_ylim(bottom=-0.03)
    axes[1].set_ylim(min(-0.03, *axes[1].get_ylim()), 1.03)
    few_ticks(*axes)
    legend(figure, c.styles, lines=True, columns=3, controls=False)
    caption = "Routing of the same held-out tokens over training, means over layers, trees and seeds"
    view.figures.append(("flips", caption, figure))
    view.tables.append(_settled(c, history))
    view.reading = [
        "κ is 0 where tokens agree with the last evaluation no more than leaf loads alone would make them, 1 where all do; "
        "at the last evaluation it is 1 by construction.",
        *([c.choice] if c.choice else []),
    ]
    return view


def _settled(c: Context, history: pl.DataFrame) -> Table:
    """Return flips at the end, and how much of the first routing is left."""
    ids = dict(c.tables.trials.select("trial", "run_id").iter_rows())
    rows = []
    for arm in c.shown:
        part = history.filter(pl.col("arm") == arm).sort("trial", "step")
        ends = part.group_by("trial", maintain_order=True).agg(
            pl.col("flip_rate", "flip_rate_worst").last(), pl.col("saturation", "saturation_worst").first()
        )
        row: dict[str, Any] = {"arm": c.labels[arm], "n": ends.height, "runs": [ids[t] for t in ends["trial"]]}
        row |= {"flip_rate": ends["flip_rate"].mean(), "flip_rate_worst": ends["flip_rate_worst"].max()}
        row |= {"saturation": ends["saturation"].mean(), "saturation_worst": ends["saturation_worst"].min()}
        rows.append(row)
    head = columns(
        flip_rate=("changed leaf before the end", ".1%", "since the evaluation before the last"),
        flip_rate_worst=("in the worst tree", ".1%"),
        saturation=("κ of step 0 with the end", ".3f"),
        saturation_worst=("in the worst tree", ".3f"),
    )
    return Table("settled", "Does routing settle? Means over seeds, and the worst tree of any seed", head, rows)
