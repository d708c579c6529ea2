"""Learning rates: how each arm got its own, how much depends on it, and what claims do at other rates."""

from __future__ import annotations

from typing import Any

import polars as pl

from ablate.analysis.rates import RULES
from ablate.config.endpoints import N_EFF
from ablate.report.context import Context
from ablate.report.draw import legend, mark, versus
from ablate.report.parts import Table, View
from ablate.report.style import DASHES, new
from ablate.report.tables import cells, columns
from ablate.report.wording import cap

FEW = 16  # arms that are all drawn
PLACES = {"shared": "at one rate", "below": "both a step lower", "above": "both a step higher"}


def rates(c: Context) -> View:
    """Show the rule, each arm's quality and balance against its rate, and claims at other rates."""
    view = View(
        "rates", "Learning rates", "Did every arm get a learning rate that suits it, and would another one matter?"
    )
    view.reading.append(rule(c))
    records = [r for r in c.findings["learning_rates"] if r["best"] is not None]
    if not records:
        return view
    edge = [c.labels.get(r["arm"], r["arm"]) for r in records if not r["interior"]]
    view.reading.append(
        "Every arm's best rate has worse ones on both sides."
        if not edge
        else f"A bound, not an optimum (the best rate is the smallest or largest tried): {', '.join(edge)}. Such an arm cannot "
        "support a claim of equal quality."
    )
    _tried(c, view, records)
    _sensitivity(c, view, records)
    _elsewhere(c, view)
    return view


def rule(c: Context) -> str:
    """Return the rule that gave the arms their rates, in a sentence."""
    name = c.findings["rate_rule"]
    if name == "none" and c.findings["design"] == "search":
        return "One learning rate for all candidates; a difference may be one of tuning. Give the search the factor `train.lr`."
    if name == "none":
        return (
            "One learning rate for all arms (`tune: none`): what differs is the arm alone, and a difference in quality may be "
            "one of tuning. `tune: bracket` finds each arm's own rate."
        )
    return f"{cap(RULES[name])}{'' if name == 'searched' else ', found on tuning seeds of their own'}."


def _tried(c: Context, view: View, records: list[dict[str, Any]]) -> None:
    of = c.quality
    rows = [
        {
            "arm": c.labels.get(r["arm"], r["arm"]),
            "chosen": r["chosen"],
            "is": "optimum" if r["interior"] else "bound, not optimum",
            "rates": "; ".join(
                f"{x['lr']:g}: {'diverged' if x[of.name] is None else format(x[of.name], of.form)}" for x in r["rates"]
            ),
            "balance": "; ".join(
                f"{x['lr']:g}: {x[N_EFF.name]:{N_EFF.form}}" for x in r["rates"] if x.get(N_EFF.name) is not None
            ),
            "best_of": "; ".join(format(v, of.form) for v in r["best_of_n"]),
            "runs": r["run_ids"],
        }
        for r in records
    ]
    head = columns(
        chosen=("chosen rate", ".3g"),
        **{"is": "which is"},
        rates=f"{of.short} at each rate",
        balance=f"{N_EFF.short} at each rate",
        best_of="expected best of 1, 2, … rates",
        n=None,
    )
    view.tables.append(Table("learning_rates", "Learning rates tried, on tuning seeds of their own", head, rows))


def _sensitivity(c: Context, view: View, records: list[dict[str, Any]]) -> None:
    """Quality and balance at each rate; the chosen one is ringed, a bound crossed."""
    figure = new(7.2, 3.8)
    axes = figure.subplots(1, 2)
    rows = []
    for r in [r for r in records if r["arm"] in c.shown or len(records) <= FEW]:
        style = c.styles.arms.get(r["arm"])
        if style is None:
            continue
        look: dict[str, Any] = {"linestyle": DASHES[style.dash], "linewidth": 1.2, "markersize": 5, **mark(style)}
        for ax, endpoint in zip(axes, (c.quality, N_EFF), strict=True):
            known = [x for x in r["rates"] if x.get(endpoint.name) is not None]
            ax.plot([x["lr"] for x in known], [x[endpoint.name] for x in known], **look)
            at = [x[endpoint.name] for x in known if x["lr"] == r["chosen"]]
            ring = "o" if r["interior"] else "x"
            ax.plot([r["chosen"]] * len(at), at, ring, markersize=11, fillstyle="none", color=style.colour)
        chosen = {"chosen": r["chosen"], "bound": not r["interior"]}
        rows += [{"arm": r["arm"], **x, "is_chosen": x["lr"] == r["chosen"], **chosen} for x in r["rates"]]
    ticks = sorted({x["lr"] for r in records for x in r["rates"]})
    for ax, endpoint in zip(axes, (c.quality, N_EFF), strict=True):
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{v:g}" for v in ticks], rotation=60, fontsize=7)
        ax.minorticks_off()
        ax.set_xlabel("learning rate")
        ax.set_ylabel(endpoint.label)
    legend(figure, c.styles, lines=True, columns=3)
    caption = "Quality and balance against the learning rate, means over tuning seeds (ring: chosen; cross: a bound)"
    view.figures.append(("learning_rates", caption, figure))
    view.data["learning_rates"] = pl.DataFrame(rows, infer_schema_length=None)


def _elsewhere(c: Context, view: View) -> None:
    """Each claim at the rates it rests on, at one rate for both arms, and a step beside the chosen ones."""
    found = [f for f in c.findings["findings"] if f["rates"].get("elsewhere")]
    if not found:
        return
    rows = []
    for f in found:
        row = {
            "claim": f"{f['endpoint']}: {versus(f['arm_label'], f['reference_label'])}",
            "own": f["effect"],
            "at": f"{f['rates']['arm']:.3g} and {f['rates']['reference']:.3g}",
            "verdict": f["verdict"],
        }
        for e in f["rates"]["elsewhere"]:
            spread = f" ({e['interval'][0]:+.3f} to {e['interval'][1]:+.3f})" if e["interval"] else ""
            row[e["at"]] = f"{e['effect']:+.3f}{spread} at {e['arm']:.3g} and {e['reference']:.3g}, n {e['n']}"
        rows.append({**dict.fromkeys(PLACES), **row})
    head = cells(claim="comparison", own=("at own rates", "+.3f"), at="rates", verdict="verdict", **PLACES)
    what = "Comparisons at other rates: the verdict rests on evaluation seeds, the other columns on tuning seeds"
    view.tables.append(Table("other_rates", what, head, rows))
    turned = [
        f
        for f in found
        if f["verdict"] == "supported" and any(e["effect"] * f["effect"] < 0 for e in f["rates"]["elsewhere"])
    ]
    if turned:
        names = "; ".join(f"{f['endpoint']} of {f['arm_label']}" for f in turned)
        view.reading.append(f"Supported at the chosen rates, with the other sign at another rate: {names}.")
