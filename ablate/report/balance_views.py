"""Views of balance: the story of each arm, where its tokens go, tree by tree, and how that moves over training."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import polars as pl
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize

from ablate.balance.metrics import bits_lost_by_level
from ablate.report.context import Context, Usage
from ablate.report.draw import few_ticks, legend, mark, panels, plain, plotly_mark, strip, wrap
from ablate.report.parts import Column, Table, View
from ablate.report.style import DASHES, DEAD, LOAD, MUTED, RUNS_AS_LINES, SIGNED, new

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
        "n_eff_frac_start": "n_eff_frac at step 0",
        "n_eff_frac_min": "at its worst",
        "n_eff_frac": "at the end",
        "dead_frac_start": "dead leaves at step 0",
        "dead_frac_max": "dead at the worst",
        "dead_frac": "dead at the end",
        "pruned_frac": "alive at step 0, died, stayed dead",
        "revived_frac": "died and came back",
    }
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
    view.tables.append(_restored(c))
    told = records if len(records) <= 20 else [a for a in records if a["arm"] in c.shown]
    view.details = ["Arm by arm, in words", *(f"{a['label']}: {a['reading']}" for a in told)]
    view.reading = [overall(records), *([c.choice] if c.choice else [])]
    return view


def _restored(c: Context) -> Table:
    """Whether balance is restored, criterion by criterion, and at other thresholds."""
    word = {True: "yes", False: "no", None: "not known"}
    rows = [
        {
            "arm": c.labels[r["arm"]],
            "n_eff_frac": r["n_eff_frac"],
            "worst": r["n_eff_frac_worst"],
            "dead": word[r["dead_ok"]],
            "bpb": word[r["bpb_ok"]],
            "restored": word[r["restored"]],
            "holds": ", ".join(t for t, v in r["at_threshold"].items() if v) or "none",
            "n": r["n"],
            "runs": r["run_ids"],
        }
        for r in c.findings["restored"]
    ]
    columns = [
        Column("arm", "arm"),
        Column("restored", "restored"),
        Column("n_eff_frac", "n_eff_frac", ".3f"),
        Column("worst", "worst tree", ".3f"),
        Column("dead", "dead leaves at most 1%"),
        Column(
            "bpb",
            "bpb non-inferior",
            help="upper end of the one-sided 95% interval against the reference arm under the margin",
        ),
        Column("holds", "restored at thresholds"),
        Column("n", "n", "d"),
        Column("runs", "runs", "runs"),
    ]
    return Table("restored", "Is balance restored? (n_eff_frac at least 0.8, and both criteria)", columns, rows)


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
    many = history["trial"].n_unique() > RUNS_AS_LINES
    for i, (ax, arm) in enumerate(zip(axes, c.shown, strict=True)):
        for part in history.filter(pl.col("arm") == arm).partition_by("trial", maintain_order=True):
            look: dict[str, Any] = {"linewidth": 1.3, "rasterized": many, "alpha": 0.3 if many else 1.0}
            ax.plot(part["step"], part["n_eff_frac"], color="#0072b2", label="n_eff_frac", **look)
            ax.plot(part["step"], part["dead_frac"], color="#d55e00", linestyle="--", label="dead_frac", **look)
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
    """log2 of each leaf's load against an even load; -20 where no token came. Counts [..., L]."""
    total = counts.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        load = np.log2(counts * counts.shape[-1] / total)
    return np.nan_to_num(np.maximum(load, -20.0), nan=-20.0)


def usage_data(c: Context, shown: list[str]) -> dict[str, Any]:
    """Loads of every evaluation as bytes, for the slider: 0 no token, else 1 + 254 steps of log2 load from -8 to 8."""
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


DRAWN_LEVELS = 6  # of a tree; deeper levels are folded into their ancestors


def tree_drawing(c: Context) -> View:
    """The least balanced tree of each arm, edges by traffic and nodes by gradient skew."""
    view = View(
        "tree",
        "Trees by traffic and gradient skew",
        "At which node does a tree go wrong, and does the gradient push it there?",
    )
    if not c.usage:
        view.missing = f"No usage table: {RUN_STUDY.format(name=c.tables.name)}."
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
    """Shares of all trees' drawn levels and their skews as bytes, for the page's own drawing: last step only."""
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


def levels(c: Context) -> View:
    """Entropy that each tree level loses."""
    view = View("levels", "Entropy lost per tree level", "Is balance lost near the root or near the leaves?")
    if not c.usage:
        view.missing = f"No usage table: {RUN_STUDY.format(name=c.tables.name)}."
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
                "line": {"color": style.colour, "dash": ["solid", "dash", "dot", "dashdot"][style.dash]},
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


def skew(c: Context) -> View:
    """Gradient skew of nodes against the nominal asymmetry of the arm's activation, and against router offset."""
    view = View(
        "skew",
        "Gradient skew against activation asymmetry",
        "Do asymmetric activations push nodes to one side, and less so once the nonlinearity sits after the sum?",
    )
    points = []
    for arm, u in c.usage.items():
        values = np.abs(u.skew[-1][np.isfinite(u.skew[-1])])
        if len(values):
            points.append(
                (arm, _asymmetry(c, arm), float(values.mean()), float(np.nanmean(np.abs(u.offset[-1]))), len(values))
            )
    if not points:
        view.missing = (
            f"No gradient skew in tables/{c.tables.name}/usage.parquet (nodes must contribute and see 30 tokens a side): "
            f"{RUN_STUDY.format(name=c.tables.name)}."
        )
        return view
    rows = [
        {"arm": c.labels[a], "asymmetry": g, "skew": s, "offset": o, "nodes": n, "runs": [c.usage[a].run_id]}
        for a, g, s, o, n in points
    ]
    columns = [
        Column("arm", "arm"),
        Column(
            "asymmetry",
            "nominal asymmetry G",
            ".2f",
            "of the node activation: ReLU 1, GELU .69, SiLU .59, mirror ±1 and tanh 0",
        ),
        Column("skew", "mean |skew|", ".3f"),
        Column("offset", "router offset", ".3f"),
        Column("nodes", "nodes", "d"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(Table("skew", "Nodes with known skew at the end of training, first seed", columns, rows))
    figure = new(7.2, 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    for a, g, s, o, _ in points:
        if g is not None:
            left.plot(g, s, linestyle="none", markersize=7, **mark(c.styles.arms[a]))
        right.plot(o, s, linestyle="none", markersize=7, **mark(c.styles.arms[a]))
    left.set_xlabel("nominal gradient asymmetry G")
    left.set_xlim(-0.05, 1.05)
    left.set_ylabel("mean absolute gradient skew")
    left.set_ylim(0, 1.15 * max(s for _, _, s, _, _ in points))
    few_ticks(right)
    right.set_xlabel("mean router offset")
    legend(figure, c.styles, columns=3, controls=False)
    view.figures.append(("skew", "Skew of node gradients at the end of training, an arm a mark", figure))
    view.reading = [
        "Placement is part of the mark: compare `unit` (before the sum) with `tree` and `sum` (after it) at equal asymmetry.",
        c.choice,
    ]
    view.reading = [t for t in view.reading if t]
    return view


ASYMMETRY = {"relu": 1.0, "gelu": 0.69, "gelu_tanh": 0.69, "silu": 0.59, "relu2": 1.0, "tanh": 0.0}


def _asymmetry(c: Context, arm: str) -> float | None:
    """Nominal G of an arm's nodes where it is tabulated (mirror 0, or an odd or even curve); None in between."""
    config = next(iter(c.tables.trials.filter(pl.col("arm") == arm)["config"].drop_nulls()), None)
    tree = (json.loads(config).get("tree") or {}) if config else {}
    s = tree.get("mirror", 0.0) if tree.get("node_mirror") is None else tree["node_mirror"]
    if s in (1, -1):
        return 0.0
    return ASYMMETRY.get(tree.get("activation", "gelu")) if s == 0 else None
