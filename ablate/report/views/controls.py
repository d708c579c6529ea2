"""The tree against its controls: quality beside dense layers, the share of their gap recovered, questions."""

from __future__ import annotations

from typing import Any

import polars as pl

from ablate.report.context import Context
from ablate.report.draw import few_ticks, mark, wrap
from ablate.report.parts import Table, View
from ablate.report.style import DASHES, INK, MUTED, new
from ablate.report.tables import cells, columns

ROWS = 40  # arms and controls drawn


def controls(c: Context) -> View:
    """Show every arm and control side by side, and the share of a full dense layer's gain that each arm keeps."""
    view = View(
        "controls",
        "Tree against its controls",
        "How much of what a dense layer of all the units gains over one of the active units does a tree keep?",
    )
    _questions(c, view)
    known = [a for a in c.findings["arms"] if a["kind"] == "control" and a[c.quality.name]]
    if not known:
        view.missing = (
            f"No control has run: add `controls: [total, active, none]` to studies/{c.tables.name}.yaml and run "
            f"`ablate study run studies/{c.tables.name}.yaml`."
        )
        return view
    _figure(c, view)
    _recovered(c, view)
    if any(a["arm"] == "moe" for a in known):
        view.reading.append(
            "The mixture of experts is an outside reference: it trains with a load loss, which no tree arm needs."
        )
    if not c.findings["learning_rates"]:
        view.reading.append("One learning rate for arms and controls: a difference may be one of tuning.")
    return view


def _figure(c: Context, view: View) -> None:
    frame, q = c.finished, c.quality.name
    present = set(frame["arm"])
    arms = [a for a in c.order if a in present and (a in c.shown or c.kinds[a] == "control")][:ROWS]
    if not arms:
        return
    shares = {(r["arm"], r["own_activation"]): r for r in c.findings["recovered"]}
    figure = new(7.6, 0.3 * len(arms) + 1.3)
    left, right = figure.subplots(1, 2, sharey=True)
    means = {a: float(frame.filter(pl.col("arm") == a)[q].to_numpy().mean()) for a in arms}
    for k, control in enumerate(a for a in arms if c.kinds[a] == "control" and " " not in a):
        left.axvline(means[control], color=INK, linewidth=0.8, alpha=0.6, linestyle=DASHES[1 + k % 3])
    right.axvline(0, color=MUTED, linewidth=0.9)
    right.axvline(1, color=MUTED, linewidth=0.9, linestyle=":")
    for i, arm in enumerate(arms[::-1]):
        style = c.styles.arms[arm]
        seeds = frame.filter(pl.col("arm") == arm)[q].to_list()
        left.plot(seeds, [i] * len(seeds), linestyle="none", markersize=5, alpha=0.85, **mark(style))
        left.plot([means[arm]] * 2, [i - 0.3, i + 0.3], color=MUTED, linewidth=1.4)
        found = shares.get((arm, False))
        # Where the task cannot tell, a share of next to nothing would only mislead.
        if found and found["effect"] is not None and found["interval"] and not cannot_tell(found):
            right.plot(found["interval"], [i, i], color=style.colour, linewidth=1.3)
            right.plot(found["effect"], i, markersize=6, **mark(style))
    left.set_yticks(range(len(arms)), [wrap(c.labels[a], 40) for a in arms[::-1]])
    left.set_xlabel(f"{c.quality.label}; lines: means of controls")
    right.set_xlabel("share of the gap recovered (0 active, 1 total)")
    few_ticks(left, right, count=4)
    view.figures.append(
        ("controls", "Left: every seed a dot, bars are means. Right: shares with 95% intervals", figure)
    )
    view.data["controls"] = frame.filter(pl.col("arm").is_in(arms)).select("arm", "kind", "seed", "trial", q)


def cannot_tell(record: dict[str, Any]) -> bool:
    """Return whether the gap is too small for this task to separate layers."""
    return any("cannot tell" in reason for reason in record["reasons"])


def _recovered(c: Context, view: View) -> None:
    found, of = c.findings["recovered"], c.quality
    if not found:
        view.reading.append("The share of the gap needs both controls: `controls: [total, active]`.")
        return
    rows = [
        {
            "arm": r["arm_label"],
            "activation": "the arm's" if r["own_activation"] else "dense section's",
            "gap": r["gap"],
            "margins": r["margins"],
            "effect": r["effect"],
            "low": r["interval"][0] if r["interval"] else None,
            "high": r["interval"][1] if r["interval"] else None,
            "verdict": "cannot tell" if cannot_tell(r) else r["verdict"],
            "p_adjusted": r["p_adjusted"],
            "n": r["n"],
            "runs": r["run_ids"],
        }
        for r in found
    ]
    head = columns(
        activation="activation of the controls",
        gap=(f"gap in {of.short}", of.form, "dense of active units minus dense of total units"),
        margins=("gap in margins", ".1f"),
        effect=("share recovered", "+.0%", "(active - arm) / (active - total), means over paired seeds"),
        low=("from", "+.0%", "Fieller's 95% interval; none where the gap is not apart from 0"),
        high=("to", "+.0%"),
        verdict="recovers some",
        p_adjusted=("adjusted p", ".3g"),
    )
    view.tables.append(Table("recovered", "Share of the gap between dense(active) and dense(total)", head, rows))
    if all(cannot_tell(r) for r in found):
        view.reading.append(
            f"Cannot tell: the gap between dense layers of active and of total units is {found[0]['gap']:{of.form}} {of.short}, "
            f"{found[0]['margins']:.1f} margins, and the gate needs five over its whole interval."
        )
        return
    view.reading += [r["text"] for r in found if not r["own_activation"] and not cannot_tell(r)][:8]


def _questions(c: Context, view: View) -> None:
    rows = []
    for a in c.findings["arms"]:
        for name, score in a["scores"].items():
            if name.count("/") != 3:
                continue
            _, task, shots, metric = name.split("/")
            beside = {key: a["scores"].get(f"{name}/{key}", {}).get("mean") for key in ("error", "chance", "unigram")}
            rows.append(
                {"arm": a["label"], "task": task, "shots": shots.removesuffix("shot"), "metric": metric}
                | {"n": score["n"], "mean": score["mean"], "low": score["min"], "high": score["max"], **beside}
            )
    if not rows:
        return
    head = cells(
        task="task",
        shots="shots",
        metric="metric",
        arm="arm",
        mean=("mean over seeds", ".4f"),
        low=("lowest", ".4f"),
        high=("highest", ".4f"),
        error=("standard error of one run", ".4f", "over questions, clustered by document; mean over seeds"),
        chance=("chance", ".3f"),
        unigram=("unigram", ".4f"),
        n=("n", "d"),
    )
    rows.sort(key=lambda r: (r["task"], r["shots"], r["metric"]))
    view.tables.append(Table("questions", "Question answering at the end of the trials", head, rows))
    above = [r for r in rows if r["chance"] is not None and r["error"] and r["mean"] > r["chance"] + 2 * r["error"]]
    better = sorted({str(r["arm"]) for r in above})
    view.reading.append(
        f"Above chance by two standard errors on some task: {', '.join(better)}."
        if better
        else "No arm answers better than chance by two standard errors."
    )
