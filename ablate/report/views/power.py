"""Seeds and power: how noisy a study is, and what it could have missed."""

from __future__ import annotations

import numpy as np
import polars as pl

from ablate.analysis.power import MOST
from ablate.report.context import Context
from ablate.report.draw import few_ticks, mark, wrap
from ablate.report.parts import Table, View
from ablate.report.style import MUTED, RUNS_AS_LINES, new
from ablate.report.tables import cells, columns, needs

DOTS = 24  # arms in the seed panel


def power(c: Context) -> View:
    """Show seeds as dots, probability of collapse, what the design could have seen, the A/A test."""
    view = View("power", "Seeds and power", "How noisy is this, and what size of effect could it have missed?")
    view.missing = needs(c, "quality")
    if view.missing:
        return view
    _seeds(c, view)
    for p in c.findings["power"]:
        find, match, worse = (
            f"{p[k]:,}" if p[k] else f"over {MOST:,}"
            for k in ("seeds_for_margin", "seeds_to_match", "seeds_for_no_worse")
        )
        view.reading.append(
            f"{p['endpoint']}: paired sd {p['paired_sd']:.4g}; {p['n']} seeds find {p['detectable']:.4g} with 80% power. Paired seeds "
            f"for the margin of {p['margin']:.3g}, unadjusted: {find} to find a difference as large, {match} to show equal arms equal "
            f"within it, {worse} to show one no worse. An exact sign-flip p cannot be under {p['smallest_sign_flip_p']:.3g} here."
        )
    _collapse(c, view)
    _twins(c, view)
    for endpoint, p in c.findings["collapse"]["brown_forsythe"].items():
        if p is not None:
            equal = "differs between arms" if p < 0.05 else "shows no difference between arms"
            view.reading.append(f"Spread of {endpoint} over seeds {equal} (Brown-Forsythe p {p:.2g}).")
    return view


def _seeds(c: Context, view: View) -> None:
    """Draw every seed as a dot, by arm."""
    frame = c.finished
    present = set(frame["arm"])
    arms = [a for a in c.order if a in present]
    arms = arms if len(arms) <= DOTS else [a for a in arms if a in c.shown or c.kinds[a] == "control"]
    figure = new(7.6, 0.27 * len(arms) + 1.2)
    many = frame.height > RUNS_AS_LINES
    left, right = figure.subplots(1, 2, sharey=True)
    for i, arm in enumerate(arms[::-1]):
        rows = frame.filter(pl.col("arm") == arm).sort("seed")
        for ax, key in ((left, c.quality.name), (right, c.balance.name)):
            x = rows[key].drop_nulls().to_list()
            look = {"markersize": 5, "alpha": 0.3 if many else 0.85, "rasterized": many}
            ax.plot(x, [i] * len(x), linestyle="none", **look, **mark(c.styles.arms[arm]))
            if x:
                ax.plot([np.mean(x)] * 2, [i - 0.3, i + 0.3], color=MUTED, linewidth=1.4)
    left.set_yticks(range(len(arms)), [wrap(c.labels[a], 40) for a in arms[::-1]])
    left.set_xlabel(c.quality.label)
    right.set_xlabel(c.balance.label)
    few_ticks(left, right)
    view.figures.append(("seeds", "Every seed a dot, bars are means", figure))
    view.data["seeds"] = frame.select("arm", "seed", "trial", "run_id", c.quality.name, c.balance.name).sort(
        "arm", "seed"
    )


def _twins(c: Context, view: View) -> None:
    """The A/A test: arms that are the same model."""
    twins = c.findings["twins"]
    if not twins:
        return
    rows = [
        {
            "a": c.labels.get(t["arms"][0], t["arms"][0]),
            "b": c.labels.get(t["arms"][1], t["arms"][1]),
            "endpoint": t["endpoint"],
            "effect": t["effect"],
            "low": t["interval"][0],
            "high": t["interval"][1],
            "p": t["p"],
            "n": t["n"],
            "runs": t["run_ids"],
        }
        for t in twins
    ]
    head = cells(
        a="arm",
        b="the same model as",
        endpoint="endpoint",
        effect=("difference", "+.5f"),
        low=("95% from", "+.5f"),
        high=("to", "+.5f"),
        p=("p", ".3g"),
        n=("n", "d"),
        runs=("runs", "runs"),
    )
    view.tables.append(Table("twins", "A/A test: arms that are one model by construction", head, rows))
    odd = sum(t["p"] < 0.05 for t in twins)
    view.reading.append(
        f"A/A test: {odd} of {len(twins)} comparisons of identical models have p < .05 (about 5% are expected)."
    )


def _collapse(c: Context, view: View) -> None:
    rows = c.findings["collapse"]["arms"]
    if not rows:
        return
    table = [
        {
            "arm": c.labels.get(r["arm"], r["arm"]),
            "collapsed": f"{r['collapsed']} of {r['n']}",
            "probability": r["probability"],
            "low": r["interval"][0],
            "high": r["interval"][1],
            "separation": r["separation"],
            "remark": r["modes"],
            "runs": r["run_ids"],
        }
        for r in rows
    ]
    head = columns(
        collapsed="collapsed",
        probability=("P(collapse)", ".2f"),
        low=("95% from", ".2f"),
        high=("to", ".2f"),
        separation=("separation", ".2f", "Ashman's D of collapsed against other runs; over 2: two modes"),
        remark="remark",
        n=None,
    )
    view.tables.append(Table("collapse", "Collapse (bits_lost over 0.5 in any layer), Wilson intervals", head, table))
    hit = sum(r["collapsed"] > 0 for r in rows)
    view.reading.append(f"{hit} of {len(rows)} arms had a collapsed run.")
