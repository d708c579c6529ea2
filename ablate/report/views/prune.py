"""Prune test: what removing unused units costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import few_ticks, legend, mark, wrap
from ablate.report.parts import Table, View
from ablate.report.style import DASHES, MUTED, new
from ablate.report.tables import cells, columns

METHODS = {
    "dead": "subtrees that hardly any token takes",
    "random": "as many units at random",
    "magnitude": "as many units, smallest weight norm first",
}


def prune_test(c: Context) -> View:
    """Show what removing units costs: dead subtrees against random units and small weights."""
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
    head = columns(
        method="method",
        threshold=("threshold", ".3g", "share of a tree's tokens at or under which a subtree was removed"),
        removed_frac=("units removed", ".1%"),
        delta_bpb=("change in bpb", "+.4f"),
        low=("lowest", "+.4f"),
        high=("highest seed", "+.4f"),
    )
    view.tables.append(Table("prune_test", "Prune test, means over seeds", head, rows))
    view.tables.append(_prune_verdicts(c))
    dead = means.filter(pl.col("method") == "dead")
    free = int(np.sum(np.abs(dead["delta_bpb"].to_numpy()) < c.findings["margin"]))
    view.reading = [
        f"Removing what hardly any token takes moved bpb by less than the margin of {c.findings['margin']:g} in {free} of "
        f"{dead.height} arms and thresholds. Paths are chosen on validation text and judged on test text, where there is enough."
    ]
    return view


def _prune_verdicts(c: Context) -> Table:
    """Return the claims behind the prune test, as findings.json has them."""
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
    head = cells(
        arm_label="model",
        removed_frac=("units removed", ".1%"),
        reference_label="against",
        claim="claim in bpb",
        verdict="verdict",
        effect=("difference in bpb", "+.6f", "paired over runs"),
        low=("95% from", "+.6f"),
        high=("to", "+.6f"),
        p_adjusted=("adjusted p", ".3g"),
        n=("n", "d"),
        runs=("runs", "runs"),
    )
    return Table("prune_verdicts", "Does removal cost anything, and less than removing other units?", head, rows)
