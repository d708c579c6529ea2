"""Views of routing as such: whether it settles, and whether what it leaves unused can be taken away."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import few_ticks, legend, mark, wrap
from ablate.report.parts import Column, Table, View
from ablate.report.style import DASHES, MUTED, new

METHODS = {
    "dead": "subtrees that hardly any token takes",
    "random": "as many units at random",
    "magnitude": "as many units, smallest weight norm first",
}


def flips(c: Context) -> View:
    """How many tokens still change their leaf, and agreement with the end beyond chance."""
    view = View("flips", "Flips and saturation of routing", "Does routing settle, and when?")
    history = c.tables.history.filter(pl.col("arm").is_in(c.shown) & (pl.col("kind") == "arm"))
    if not history["flip_rate"].count() and not history["saturation"].count():
        view.missing = (
            f"No flip_rate or saturation in tables/{c.tables.name}/history.parquet (a study of two evaluations or more with "
            f"trees has them): run `ablate study run studies/{c.tables.name}.yaml`, then `ablate collect {c.tables.name}`."
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
    """Flips at the end, and how much of the first routing is left."""
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
    columns = [
        Column("arm", "arm"),
        Column("flip_rate", "changed leaf before the end", ".1%", "since the evaluation before the last"),
        Column("flip_rate_worst", "in the worst tree", ".1%"),
        Column("saturation", "κ of step 0 with the end", ".3f"),
        Column("saturation_worst", "in the worst tree", ".3f"),
        Column("n", "n", "d"),
        Column("runs", "runs", "runs"),
    ]
    return Table("settled", "Does routing settle? Means over seeds, and the worst tree of any seed", columns, rows)


def prune_test(c: Context) -> View:
    """What removing units costs: dead subtrees against random units and small weights."""
    view = View("prune", "Prune test", "Can dead subtrees be removed for nothing, and is that more than chance?")
    prune, name = c.tables.prune, c.tables.name
    if prune is None or prune.is_empty():
        view.missing = (
            f"No prune test in tables/{name}/: keep final weights (train.keep_checkpoint: true under base), run `ablate study "
            f"run studies/{name}.yaml`, then `ablate prune RUN --threshold 0.01/L` for its runs, then `ablate collect {name}`."
        )
        return view
    view.data["prune"] = prune.sort("arm", "method", "threshold", "seed")
    # Seeds differ in how much a threshold removes, so that means are over seeds of one threshold.
    means = (
        view.data["prune"]
        .group_by("arm", "method", "threshold", maintain_order=True)
        .agg(
            pl.col("removed_frac", "delta_bpb").mean(),
            pl.col("delta_bpb").min().alias("low"),
            pl.col("delta_bpb").max().alias("high"),
            pl.len().alias("n"),
            pl.col("run_id").alias("runs"),
        )
    )
    arms = [a for a in c.shown if a in set(means["arm"])]
    figure = new(7.6, 3.9)
    axes = figure.subplots(1, len(METHODS), sharex=True, sharey=True)
    for ax, (method, words) in zip(axes, METHODS.items(), strict=True):
        ax.axhline(0, color=MUTED, linewidth=0.9)
        for arm in arms:
            style = c.styles.arms[arm]
            here = (pl.col("method") == method) & (pl.col("arm") == arm)
            seeds, part = prune.filter(here), means.filter(here)
            ax.plot(seeds["removed_frac"], seeds["delta_bpb"], ".", color=style.colour, markersize=3, alpha=0.6)
            line: dict[str, Any] = {"linestyle": DASHES[style.dash], "linewidth": 1.2, "markersize": 5, **mark(style)}
            ax.plot(part["removed_frac"], part["delta_bpb"], **line)
        ax.set_title(wrap(words, 30))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    few_ticks(*axes, count=4)
    axes[0].set_ylabel("change in bits per byte")
    axes[len(axes) // 2].set_xlabel("share of units removed")
    legend(figure, c.styles, lines=True, columns=3, controls=False)
    caption = "What removal costs; a mark is the mean of an arm's seeds at one threshold, a dot a seed"
    view.figures.append(("prune", caption, figure))
    rows = [{**r, "arm": c.labels.get(r["arm"], r["arm"])} for r in means.iter_rows(named=True)]
    columns = [
        Column("arm", "arm"),
        Column("method", "method"),
        Column("threshold", "threshold", ".3g", "share of a tree's tokens at or under which a subtree was removed"),
        Column("removed_frac", "units removed", ".1%"),
        Column("delta_bpb", "change in bpb", "+.4f"),
        Column("low", "lowest", "+.4f"),
        Column("high", "highest seed", "+.4f"),
        Column("n", "n", "d"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(Table("prune_test", "Prune test, means over seeds", columns, rows))
    view.tables.append(_prune_verdicts(c))
    dead = means.filter(pl.col("method") == "dead")
    free = int(np.sum(np.abs(dead["delta_bpb"].to_numpy()) < c.findings["margin"]))
    view.reading = [
        f"Removing what hardly any token takes moved bpb by less than the margin of {c.findings['margin']:g} in {free} of "
        f"{dead.height} arms and thresholds. Paths are chosen on validation text and judged on test text, where there is enough."
    ]
    return view


def _prune_verdicts(c: Context) -> Table:
    """The claims behind the prune test, as findings.json has them."""
    rows = [
        {
            **{
                k: f[k]
                for k in ("arm_label", "reference_label", "removed_frac", "verdict", "effect", "p_adjusted", "n")
            },
            "low": f["interval"][0] if f["interval"] else None,
            "high": f["interval"][1] if f["interval"] else None,
            "claim": f"matches within {f['margin']:g}" if f["claim"] == "matches" else f["claim"],
            "runs": f["run_ids"],
        }
        for f in c.findings["pruning"]
    ]
    columns = [
        Column("arm_label", "model"),
        Column("removed_frac", "units removed", ".1%"),
        Column("reference_label", "against"),
        Column("claim", "claim in bpb"),
        Column("verdict", "verdict"),
        Column("effect", "difference in bpb", "+.6f", "paired over runs"),
        Column("low", "95% from", "+.6f"),
        Column("high", "to", "+.6f"),
        Column("p_adjusted", "adjusted p", ".3g"),
        Column("n", "n", "d"),
        Column("runs", "runs", "runs"),
    ]
    return Table("prune_verdicts", "Does removal cost anything, and less than removing other units?", columns, rows)
