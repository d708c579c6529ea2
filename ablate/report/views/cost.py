"""Cost: units, parameters, FLOPs, tokens and measured time."""

from __future__ import annotations

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import few_ticks, legend, mark
from ablate.report.parts import Table, View
from ablate.report.style import new
from ablate.report.tables import absent, columns

COUNTS: dict[str, tuple[str, str]] = {
    "total_units": ("units", ",.0f"),
    "active_units": ("active units", ",.0f"),
    "active_frac": ("active share", ".1%"),
    "total_params": ("parameters", ",.0f"),
    "active_params": ("active parameters", ",.0f"),
    "flops_per_token": ("FLOPs a token", ",.0f"),
    "tokens": ("training tokens", ",.0f"),
    "seconds": ("seconds", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}


def cost(c: Context) -> View:
    """Show units, parameters, FLOPs, tokens and measured time of every arm."""
    view = View("cost", "Cost", "What does each arm cost, in units, parameters, arithmetic and measured time?")
    q = c.quality
    rows = [
        {"arm": a["label"], **{key: a[key] for key in COUNTS}, "n": a["n"], "runs": a["run_ids"]}
        | {q.name: a[q.name]["mean"] if a[q.name] else None}
        for a in c.findings["arms"]
    ]
    caption = "Counts are exact; time is measured on the machines named below, means over seeds"
    view.tables.append(Table("cost", caption, columns(**{q.name: (q.short, q.form)}, **COUNTS), rows))
    known = [r for r in rows if r[q.name] is not None and r["flops_per_token"] is not None]
    if not known:
        view.missing = absent(c, "No finished run with costs")
        return view
    _figure(c, view, len(known))
    tokens = sorted({r["tokens"] for r in known if r["tokens"] is not None})
    view.reading.append(f"Training tokens a run: {', '.join(f'{t:,.0f}' for t in tokens[:5])}.")
    view.reading.append("Time depends on the machine, its load and the threads; compare only runs of one machine type.")
    drawn = ("arm", q.name, "flops_per_token", "tokens_per_second", "seconds")
    view.data["cost_points"] = pl.DataFrame([{k: r[k] for k in drawn} for r in known])
    return view


def _figure(c: Context, view: View, known: int) -> None:
    """Arm means of quality against FLOPs and against speed; a diverged arm must not stretch the axis."""
    q = c.quality.name
    drawn = [
        a
        for a in c.findings["arms"]
        if a[q] and a["flops_per_token"] is not None and (known <= 60 or a["arm"] in c.shown)
    ]
    # One amount of arithmetic for all arms makes an axis that says nothing.
    keys = ["flops_per_token", "tokens_per_second"][len({a["flops_per_token"] for a in drawn}) < 2 :]
    figure = new(3.7 * len(keys), 4.0)
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    left, right = axes[0], axes[-1]
    for a in drawn:
        for ax, key in zip(axes, keys, strict=True):
            if a[key] is not None:
                ax.plot(a[key], a[q]["mean"], linestyle="none", markersize=7, **mark(c.styles.arms[a["arm"]]))
    finite = np.array([a[q]["mean"] for a in drawn if not a["statuses"].get("diverged")])
    if len(finite):
        pad = 0.08 * max(float(np.ptp(finite)), 1e-3)
        left.set_ylim(float(finite.min()) - pad, float(finite.max()) + pad)
    left.set_ylabel(c.quality.label)
    right.set_xlabel("training tokens a second, measured")
    few_ticks(*axes, count=4)
    what = "measured speed"
    if len(keys) > 1:
        left.set_xlabel("FLOPs a token (forward)")
        left.ticklabel_format(axis="x", style="sci", scilimits=(6, 6))
        what = f"arithmetic and against {what}"
    legend(figure, c.styles, columns=3)
    view.figures.append(("cost", f"Quality against {what}, arm means", figure))
