"""Seeds and power: how noisy a study is, and what it could have missed."""

from __future__ import annotations

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import few_ticks, mark, wrap
from ablate.report.parts import Column, Table, View
from ablate.report.style import MUTED, RUNS_AS_LINES, new

DOTS = 24  # arms in the seed panel


def power(c: Context) -> View:
    """Seeds as dots, probability of collapse, what the design could have seen, the A/A test."""
    view = View("power", "Seeds and power", "How noisy is this, and what size of effect could it have missed?")
    frame = c.outcomes.filter(pl.col("bpb").is_not_null() & (pl.col("status") == "finished"))
    if frame.is_empty():
        view.missing = f"No finished run: run `ablate study run studies/{c.tables.name}.yaml`."
        return view
    present = set(frame["arm"])
    arms = [a for a in c.order if a in present]
    arms = arms if len(arms) <= DOTS else [a for a in arms if a in c.shown or c.kinds[a] == "control"]
    figure = new(7.6, 0.27 * len(arms) + 1.2)
    many = frame.height > RUNS_AS_LINES
    left, right = figure.subplots(1, 2, sharey=True)
    for i, arm in enumerate(arms[::-1]):
        rows = frame.filter(pl.col("arm") == arm).sort("seed")
        for ax, key in ((left, "bpb"), (right, "n_eff_frac")):
            x = rows[key].drop_nulls().to_list()
            look = {"markersize": 5, "alpha": 0.3 if many else 0.85, "rasterized": many}
            ax.plot(x, [i] * len(x), linestyle="none", **look, **mark(c.styles.arms[arm]))
            if x:
                ax.plot([np.mean(x)] * 2, [i - 0.3, i + 0.3], color=MUTED, linewidth=1.4)
    left.set_yticks(range(len(arms)), [wrap(c.labels[a], 40) for a in arms[::-1]])
    left.set_xlabel("bits per byte")
    right.set_xlabel("effective leaves / L")
    few_ticks(left, right)
    view.figures.append(("seeds", "Every seed a dot, bars are means", figure))
    view.data["seeds"] = frame.select("arm", "seed", "trial", "run_id", "bpb", "n_eff_frac").sort("arm", "seed")
    for p in c.findings["power"]:
        need = f"{p['seeds_for_margin']} paired seeds" if p["seeds_for_margin"] else "over 100 paired seeds"
        view.reading.append(
            f"{p['endpoint']}: paired sd {p['paired_sd']:.4g}; {p['n']} seeds find {p['detectable']:.4g} with 80% power, the margin "
            f"of {p['margin']:g} needs {need}. An exact sign-flip p cannot be under {p['smallest_sign_flip_p']:.3g} here."
        )
    _collapse(c, view)
    twins = c.findings["twins"]
    if twins:
        rows_out = [
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
        columns = [
            Column("a", "arm"),
            Column("b", "the same model as"),
            Column("endpoint", "endpoint"),
            Column("effect", "difference", "+.5f"),
            Column("low", "95% from", "+.5f"),
            Column("high", "to", "+.5f"),
            Column("p", "p", ".3g"),
            Column("n", "n", "d"),
            Column("runs", "runs", "runs"),
        ]
        view.tables.append(Table("twins", "A/A test: arms that are one model by construction", columns, rows_out))
        odd = sum(t["p"] < 0.05 for t in twins)
        view.reading.append(
            f"A/A test: {odd} of {len(twins)} comparisons of identical models have p < .05 (about 5% are expected)."
        )
    spreads = c.findings["collapse"]["brown_forsythe"]
    for endpoint, p in spreads.items():
        if p is not None:
            equal = "differs between arms" if p < 0.05 else "shows no difference between arms"
            view.reading.append(f"Spread of {endpoint} over seeds {equal} (Brown-Forsythe p {p:.2g}).")
    return view


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
    columns = [
        Column("arm", "arm"),
        Column("collapsed", "collapsed"),
        Column("probability", "P(collapse)", ".2f"),
        Column("low", "95% from", ".2f"),
        Column("high", "to", ".2f"),
        Column("separation", "separation", ".2f", "Ashman's D of collapsed against other runs; over 2: two modes"),
        Column("remark", "remark"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(
        Table("collapse", "Collapse (bits_lost over 0.5 in any layer), Wilson intervals", columns, table)
    )
    hit = sum(r["collapsed"] > 0 for r in rows)
    view.reading.append(f"{hit} of {len(rows)} arms had a collapsed run.")
