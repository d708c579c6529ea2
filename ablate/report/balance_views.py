"""Views of balance: the story of each arm, where its tokens go, tree by tree, and how that moves over training."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import legend, mark, panels, strip, wrap
from ablate.report.parts import Column, Table, View
from ablate.report.style import DEAD, LOAD, MUTED, new

RUN_STUDY = "run `ablate study run studies/{name}.yaml`, then `ablate collect {name}`"
FLOOR, CEIL = -6.0, 3.0  # log2 of load against an even load, as drawn


def balance_story(c: Context) -> View:
    """Imbalance at birth, transient collapse and self-pruning told apart, an arm a row."""
    view = View(
        "balance", "Imbalance at birth, transient collapse, self-pruning", "Where does imbalance come from, arm by arm?"
    )
    records = [a for a in c.findings["arms"] if a["n_eff_frac"]]
    if not records:
        view.missing = f"No tree arm with balance measured: {RUN_STUDY.format(name=c.tables.name)}."
        return view
    keys = {
        "n_eff_frac_start": "n_eff_frac at step 0", "n_eff_frac_min": "at its worst", "n_eff_frac": "at the end",
        "dead_frac_start": "dead leaves at step 0", "dead_frac_max": "dead at the worst", "dead_frac": "dead at the end",
        "pruned_frac": "alive at step 0, died, stayed dead", "revived_frac": "died and came back",
    }  # fmt: skip
    forms = {k: ".3f" if k.startswith("n_eff") else ".1%" for k in keys}
    rows = [
        {"arm": a["label"], "n": a["n"], **{k: a[k]["mean"] if a[k] else None for k in keys}, "runs": a["run_ids"]}
        for a in records
    ]
    columns = [
        Column("arm", "arm"),
        Column("n", "n", "d"),
        *(Column(k, t, forms[k]) for k, t in keys.items()),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(
        Table("balance_story", "Balance at birth, at its worst and at the end (means over seeds)", columns, rows)
    )
    view.reading = [f"{a['label']}: {a['reading']}" for a in records] if len(records) <= 20 else [
        f"{a['label']}: {a['reading']}" for a in records if a["arm"] in c.shown
    ]  # fmt: skip
    view.reading.insert(0, overall(records))
    return view


def overall(records: list[dict[str, Any]]) -> str:
    """One sentence over all arms."""
    n = len(records)
    counts = {
        s: sum(s in a["signs"] for a in records) for s in ("born_imbalanced", "dips", "self_prunes", "ends_balanced")
    }
    return (
        f"Of {n} tree arms, {counts['born_imbalanced']} start imbalanced before any gradient (n_eff_frac under 0.8), "
        f"{counts['dips']} dip below both ends of training (transient collapse), {counts['self_prunes']} prune themselves "
        f"(over 1% of leaves alive at step 0 die and stay dead), and {counts['ends_balanced']} end balanced "
        "(n_eff_frac at least 0.8, at most 1% dead)."
    )


def trajectories(c: Context) -> View:
    """n_eff_frac and dead leaves over training, every seed a line."""
    view = View(
        "trajectories",
        "Dead leaves and effective leaves over training",
        "Do trees recover, or prune themselves for good?",
    )
    history = c.tables.history.filter(pl.col("arm").is_in(c.shown) & (pl.col("kind") == "arm"))
    history = history.filter(pl.col("n_eff_frac").is_not_null())
    if history.is_empty():
        view.missing = f"No balance in the history table: {RUN_STUDY.format(name=c.tables.name)}."
        return view
    view.data["trajectories"] = history.select("arm", "seed", "trial", "step", "n_eff_frac", "dead_frac", "bits_lost")
    view.reading = [c.choice] if c.choice else []
    figure, axes = panels(len(c.shown))
    for i, (ax, arm) in enumerate(zip(axes, c.shown, strict=True)):
        for part in history.filter(pl.col("arm") == arm).partition_by("trial", maintain_order=True):
            ax.plot(part["step"], part["n_eff_frac"], color="#0072b2", linewidth=1.3, label="n_eff_frac")
            ax.plot(part["step"], part["dead_frac"], color="#d55e00", linewidth=1.3, linestyle="--", label="dead_frac")
        ax.axhline(0.8, color=MUTED, linewidth=0.8, linestyle=":")
        ax.set_title(wrap(c.labels[arm], 32))
        ax.set_ylim(-0.03, 1.03)
        if i == 0:
            handles, names = ax.get_legend_handles_labels()
            figure.legend(
                handles[:2],
                ["n_eff_frac (effective leaves / L)", "dead_frac (share of leaves)"],
                loc="outside upper center",
                ncols=2,
            )
            del names
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("share of leaves", fontsize=9)
    view.figures.append(
        (
            "trajectories",
            "Effective leaves (solid) and dead leaves (dashed) over training; every line is a seed, dotted: 0.8",
            figure,
        )
    )
    return view


def usage_map(c: Context) -> View:
    """Load of every leaf against an even load, layer by leaf."""
    view = View("usage", "Where tokens go: layer by leaf", "Which leaves carry the load, in which layer?")
    if not c.usage:
        view.missing = f"No usage table: {RUN_STUDY.format(name=c.tables.name)}."
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
        colours = LOAD.copy()
        colours.set_bad(DEAD)
        masked = np.ma.masked_where(flat <= np.log2(0.01), flat)
        image = ax.imshow(masked, aspect="auto", cmap=colours, vmin=FLOOR, vmax=-FLOOR, interpolation="nearest")
        strip(ax)
        ax.set_title(wrap(f"{c.labels[arm]} (seed {u.seed})", 34))
        ax.set_yticks([trees * i + (trees - 1) / 2 for i in range(layers)], [str(i) for i in range(layers)])
        for i in range(1, layers):
            ax.axhline(trees * i - 0.5, color=MUTED, linewidth=0.6)
        ax.set_xticks([0, leaves - 1], ["0", str(leaves - 1)])
        for layer, tree in np.ndindex(layers, trees):
            rows.append({"arm": arm, "seed": u.seed, "trial": u.trial, "step": u.steps[-1], "layer": layer, "tree":
            tree,
                         "counts": " ".join(str(v) for v in u.leaves[-1, layer, tree])})  # fmt: skip
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
    view.reading = [
        t for t in ["A row is one tree, never an average of trees; one seed an arm, the first.", c.choice] if t
    ]
    return view


def log_load(counts: Any) -> Any:
    """log2 of each leaf's load against an even load; -20 where no token came. Counts [..., L]."""
    total = counts.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        load = np.log2(counts * counts.shape[-1] / total)
    return np.nan_to_num(np.maximum(load, -20.0), nan=-20.0)


def pareto_v1(c: Context) -> View:
    """Balance against quality, every run a dot."""
    view = View("pareto", "Balance against quality", "Is balance paid for in bits per byte?")
    frame = c.outcomes.filter(pl.col("bpb").is_not_null())
    trees = frame.filter(pl.col("n_eff_frac").is_not_null())
    figure = new(6.4, 4.4)
    ax = figure.subplots()
    for row in trees.filter(pl.col("status") == "finished").iter_rows(named=True):
        ax.plot(
            row["n_eff_frac"], row["bpb"], markersize=6, alpha=0.85, linestyle="none", **mark(c.styles.arms[row["arm"]])
        )
    ax.set_xlabel("effective leaves / L (right is better)")
    ax.set_ylabel("bits per byte (down is better)")
    legend(figure, c.styles, columns=3)
    view.figures.append(("pareto", "Every run: balance against quality", figure))
    view.data["pareto"] = trees.select("arm", "seed", "trial", "n_eff_frac", "bpb", "status")
    return view
