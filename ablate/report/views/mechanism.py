"""The mechanism in one figure: deaths, direction, and who moves nodes, when the backward pass alone is changed."""

from __future__ import annotations

from typing import Any

import polars as pl

from ablate.report.context import Context
from ablate.report.draw import mark, wrap, zero
from ablate.report.parts import Table, View
from ablate.report.style import DASHES, MUTED, new
from ablate.report.tables import columns

PUSHES = {"router_fuller": "the router", "drift_fuller": "drift"}


def mechanism(c: Context) -> View:
    """Show dead leaves and direction over training, and pushes towards the fuller side, by arm."""
    view = View(
        "mechanism",
        "Does pruning follow the backward pass?",
        "If the forward pass stays and only the slope in the nodes' gradients changes, do deaths change with it?",
    )
    found = c.findings["mechanism"]
    if found is None:
        view.missing = (
            "This study leaves the backward pass as it is: `ablate study run studies/backward.yaml` changes it alone."
        )
        return view
    arms = [arm for arm in c.order if arm in c.trees]
    view.reading = [_verdict(found), *_moves(c, found["pushes"]), *_foretold(c, found["prediction"])]
    if len({a["lr"] for a in c.findings["arms"] if a["arm"] in arms}) > 1:
        view.reading.append(
            "The arms ran at learning rates of their own, and deaths depend on the rate: a claim on mechanism needs one rate for "
            "all (`tune: none`)."
        )
    figure = new(9.4, 3.5)
    died, turned, moved = figure.subplots(1, 3)
    history = c.history.filter(pl.col("dead_frac").is_not_null())
    for arm in arms:
        style, rows = c.styles.arms[arm], history.filter(pl.col("arm") == arm)
        for one in rows.partition_by("trial", maintain_order=True):
            died.plot(one["step"], one["dead_frac"], color=style.colour, linewidth=0.5, alpha=0.45)
        mean = rows.group_by("step", maintain_order=True).agg(pl.col("dead_frac").mean())
        died.plot(
            mean["step"], mean["dead_frac"], label=wrap(c.labels[arm], 30, 1),
            linestyle=DASHES[style.dash], linewidth=1.5, markersize=4, **mark(style),
        )  # fmt: skip
    died.set_title("dead leaves, share")
    died.set_xlabel("optimizer step")
    if found["pushes"]:
        _direction(c, turned, arms, found["pushes"])
        _pushes(c, moved, arms, found["pushes"])
    else:
        for ax in (turned, moved):
            ax.set_visible(False)
    figure.legend(*died.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    view.figures.append(
        (
            "mechanism",
            "Left: dead leaves, every thin line a seed. Middle: mean of 2r - 1 over nodes, r the share that goes right. "
            "Right: how far nodes moved towards their fuller side between evaluations, by cause, mean and 95% interval",
            figure,
        )
    )
    if found["pushes"]:
        view.tables.append(_table(c, found["pushes"]))
    if found["prediction"]:
        view.tables.append(_prediction(c, found["prediction"]))
    return view


def _direction(c: Context, ax: Any, arms: list[str], pushes: list[dict[str, Any]]) -> None:
    for arm in arms:
        rows, style = [p for p in pushes if p["arm"] == arm], c.styles.arms[arm]
        steps, means = [p["step"] for p in rows], [p["right_excess"]["mean"] for p in rows]
        ax.plot(steps, means, linestyle=DASHES[style.dash], linewidth=1.3, markersize=4, **mark(style))
        spread = [p["right_excess"]["interval"] for p in rows]
        if spread and all(spread):
            ax.fill_between(steps, *zip(*spread, strict=True), color=style.colour, alpha=0.12, linewidth=0)
    zero(ax, vertical=False)
    ax.set_title("more tokens right (+) or left (-)")
    ax.set_xlabel("optimizer step")


def _pushes(c: Context, ax: Any, arms: list[str], pushes: list[dict[str, Any]]) -> None:
    last = {p["arm"]: p for p in pushes}
    for place, arm in enumerate(arms):
        if arm not in last:
            continue
        for cause, shift, filled in (("router_fuller", 0.17, True), ("drift_fuller", -0.17, False)):
            value, style = last[arm][cause], c.styles.arms[arm]
            at = len(arms) - 1 - place + shift
            if value["interval"]:
                ax.plot(value["interval"], [at, at], color=style.colour, linewidth=1.2)
            face = style.colour if filled else "none"
            ax.plot(
                value["mean"], at, linestyle="none", marker="o", markersize=5, color=style.colour, markerfacecolor=face
            )
    ax.set_yticks(range(len(arms)), [wrap(c.labels[a], 18, 2) for a in reversed(arms)], fontsize=7)
    zero(ax)
    ax.set_title("moved to the fuller side, last interval", color="black")
    ax.set_xlabel("sd of z − t (filled: router, open: drift)", color=MUTED)


def _verdict(found: dict[str, Any]) -> str:
    says = {
        "supported": "Deaths follow the backward pass: every contrast named for it before the first trial is supported.",
        "refuted": "Deaths do not follow the backward pass: a contrast named for it before the first trial is refuted.",
        "inconclusive": "Whether deaths follow the backward pass is not decided by this study.",
    }
    rests = f" (it rests on {', '.join(found['rests_on'])})" if found["rests_on"] else " (no contrast was named for it)"
    return says[found["verdict"]] + rests


def _moves(c: Context, pushes: list[dict[str, Any]]) -> list[str]:
    """A sentence an arm on its last evaluation: where tokens lean, and who moved nodes."""
    out = []
    for arm, p in {p["arm"]: p for p in pushes}.items():
        lean, spread = p["right_excess"]["mean"], p["right_excess"]["interval"]
        sure = f" (95% interval {spread[0]:+.3f} to {spread[1]:+.3f}, n {p['n']})" if spread else ""
        moved = ", ".join(f"{name} {p[key]['mean']:+.3f}" for key, name in PUSHES.items())
        out.append(
            f"{c.labels[arm]}: 2r - 1 is {lean:+.3f} at the end{sure}; towards the fuller side moved {moved} sd."
        )
    return out


def _foretold(c: Context, rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{c.labels[r['arm']]}: skew changes the prediction of lost sides by {r['gain']:+.3f} in AUC "
        f"(95% interval {r['interval'][0]:+.3f} to {r['interval'][1]:+.3f}, {r['n']} held-out seeds)."
        for r in rows
    ]


def _table(c: Context, pushes: list[dict[str, Any]]) -> Table:
    names = {
        "right_excess": "right excess",
        "imbalance": "imbalance",
        "router_right": "router, right",
        "drift_right": "drift, right",
        "router_fuller": "router, fuller side",
        "drift_fuller": "drift, fuller side",
    }
    rows = [
        {"arm": c.labels[p["arm"]], "since": p["since"], "step": p["step"], "n": p["n"], "runs": p["run_ids"]}
        | {key: p[key]["mean"] for key in names}
        for p in pushes
    ]
    measured = {key: (title, "+.3f") for key, title in names.items()}
    head = columns(since=("from step", "d"), step=("to step", "d"), **measured)
    return Table("mechanism_pushes", "Mean motion of nodes between evaluations, in sd of z - t", head, rows)


def _prediction(c: Context, found: list[dict[str, Any]]) -> Table:
    rows = [r | {"arm": c.labels[r["arm"]], "low": r["interval"][0], "high": r["interval"][1]} for r in found]
    head = columns(
        auc=("AUC", ".3f", "of lost sides by share, traffic, level and router offset"),
        auc_with_skew=("AUC with skew", ".3f"),
        gain=("gain", "+.3f"),
        low=("95% low", "+.3f"),
        high=("95% high", "+.3f"),
        p=("p", ".3g"),
        n=("held-out seeds", "d"),
        sides=("sides", "d"),
        lost=("lost", "d"),
        runs=None,
    )
    return Table("mechanism_prediction", "Does skew foretell which sides are lost?", head, rows)
