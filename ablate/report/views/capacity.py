"""Capacity: bits stored against the number of facts, and against balance."""

from __future__ import annotations

from typing import Any

import polars as pl

from ablate.config.endpoints import KBIT_STORED
from ablate.report.context import Context
from ablate.report.draw import few_ticks, legend, mark
from ablate.report.parts import Table, View
from ablate.report.style import COLOURS, DASHES, MARKERS, ArmStyle, Styles, new
from ablate.report.tables import cells


def capacity(c: Context) -> View:
    """Show what each layer stores as the number of facts grows, and what a unit stores against balance."""
    view = View("capacity", "Capacity", "How much does each layer store, and does a balanced tree store more?")
    curves = c.findings["capacity"]
    styles = {
        curve["curve"]: ArmStyle(COLOURS[i % len(COLOURS)], i % len(MARKERS), i < len(COLOURS), i % len(DASHES))
        for i, curve in enumerate(curves)
    }
    points = [{"curve": curve["curve"], **p} for curve in curves for p in curve["points"]]
    view.data["capacity"] = pl.DataFrame([{k: v for k, v in p.items() if k != "run_ids"} for p in points])
    _against_facts(view, curves, styles)
    if any(p["n_eff_frac"] is not None for p in points):
        _against_balance(view, curves, styles)
    view.reading += _reading(curves)
    head = cells(
        curve="layer",
        facts=("N", ",.0f"),
        kbit_stored=("kbit stored", ".2f"),
        accuracy=("accuracy", ".3f"),
        bits_per_unit=("bits a unit", ",.0f", "bits stored over all units of the layer"),
        n_eff_frac=("n_eff_frac", ".2f"),
        n=("n", "d"),
        runs=("runs", "runs"),
    )
    rows = [{**p, "runs": p["run_ids"]} for p in points]
    view.tables.append(Table("capacity", "What each layer stores of N facts, means over seeds", head, rows))
    return view


def _against_facts(view: View, curves: list[dict[str, Any]], styles: dict[str, ArmStyle]) -> None:
    """Bits stored over N on a logarithmic axis."""
    figure = new(7.2, 4.4)
    ax = figure.subplots()
    for curve in curves:
        style, points = styles[curve["curve"]], curve["points"]
        x = [p["facts"] for p in points]
        ax.fill_between(
            x, [p["low"] for p in points], [p["high"] for p in points], color=style.colour, alpha=0.15, linewidth=0
        )
        dash: Any = DASHES[style.dash]
        ax.plot(x, [p[KBIT_STORED.name] for p in points], linestyle=dash, linewidth=1.3, markersize=5, **mark(style))
    ax.set_xscale("log", base=2)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("N, facts to store")
    ax.set_ylabel(KBIT_STORED.label)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    legend(figure, Styles(styles, list(styles.items())), lines=True, columns=3)
    view.figures.append(
        ("capacity", "Bits stored against the number of facts: means, with the range over seeds", figure)
    )


def _against_balance(view: View, curves: list[dict[str, Any]], styles: dict[str, ArmStyle]) -> None:
    """Bits a unit against n_eff_frac at the number of facts where the trees store most."""
    trees = [curve for curve in curves if any(p["n_eff_frac"] is not None for p in curve["points"])]
    totals: dict[int, float] = {}
    for curve in trees:
        for p in curve["points"]:
            totals[p["facts"]] = totals.get(p["facts"], 0.0) + p[KBIT_STORED.name]
    count = max(totals, key=lambda n: totals[n])
    figure = new(5.6, 4.2)
    ax = figure.subplots()
    for curve in trees:
        for p in curve["points"]:
            if p["facts"] == count and p["n_eff_frac"] is not None:
                ax.plot(
                    p["n_eff_frac"], p["bits_per_unit"], linestyle="none", markersize=8, **mark(styles[curve["curve"]])
                )
    ax.set_xlim(0, 1.02)
    ax.set_ylim(bottom=0)
    few_ticks(ax)
    ax.set_xlabel("n_eff_frac, share of the leaves in effective use (right is better)")
    ax.set_ylabel("bits stored a unit")
    own = {curve["curve"]: styles[curve["curve"]] for curve in trees}
    legend(figure, Styles(own, list(own.items())), columns=3)
    caption = f"Bits stored a unit against balance at N = {count:,}, means over seeds"
    view.figures.append(("capacity_balance", caption, figure))


def _reading(curves: list[dict[str, Any]]) -> list[str]:
    """One sentence a curve: at how many facts half of them are known."""
    known = sorted((curve for curve in curves if curve["half"]), key=lambda curve: -curve["half"]["mean"])
    lines = []
    if known:
        parts = [
            f"{curve['curve']} {h['mean']:,.0f}"
            + (f" ({h['low']:,.0f} to {h['high']:,.0f} over seeds)" if h["n"] > 1 else "")
            for curve in known
            for h in [curve["half"]]
        ]
        lines.append(f"Facts of which half are known: {'; '.join(parts)}.")
    never = [curve["curve"] for curve in curves if not curve["half"]]
    if never:
        lines.append(f"Accuracy does not pass one half within the numbers tried: {', '.join(never)}.")
    return lines
