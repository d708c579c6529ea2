"""Main effects: what each factor does alone, and how much of the variance each term explains."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.config.endpoints import ENDPOINTS, label_of
from ablate.report.context import Context
from ablate.report.draw import rows_above, versus, zero
from ablate.report.parts import Table, View
from ablate.report.style import COLOURS, MARKERS, NARROW, VERDICT_COLOUR, VERDICT_MARK, new
from ablate.report.tables import cells
from ablate.report.wording import cap, no_factors, short


def main_effects(c: Context) -> View:
    """Show the effect of each factor's levels, and partial omega squared of each term."""
    view = View("effects", "Main effects and importance", "Which single choice matters, for balance and for quality?")
    effects = c.findings["effects"]
    if not effects["terms"]:
        view.missing = no_factors(c)
        return view
    rows = [
        {
            "term": " × ".join(short(t) for t in e["term"]),
            "endpoint": e["endpoint"],
            "df": e["df"],
            "error_df": e["error_df"],
            "f": e["f"],
            "p_adjusted": e["p_adjusted"],
            "omega2": e["omega2"],
            "low": (e["interval"] or [None])[0],
            "high": (e["interval"] or [None, None])[1],
            "n": e["n"],
            "read": "simple effects only" if e["suppressed"] else "can be read alone" if len(e["term"]) == 1 else "",
            "runs": e["run_ids"],
        }
        for e in effects["terms"]
    ]
    head = cells(
        term="term",
        endpoint="endpoint",
        df=("df", "d"),
        error_df=("error df", ".1f", "of the term's variation over seeds, or of the runs where seeds ran unlike cells"),
        f=("F", ".2f"),
        p_adjusted=("adjusted p", ".3g"),
        omega2=("partial ω²", ".3f"),
        low=("95% from", ".3f"),
        high=("to", ".3f"),
        n=("runs n", "d"),
        read="how to read",
        runs=("runs", "runs"),
    )
    view.tables.append(Table("terms", "Type II analysis with seeds as blocks; intervals resample seeds", head, rows))
    view.reading = _effect_reading(c)
    _importance_figure(view, effects["terms"])
    _level_figure(c, view)
    return view


def _effect_reading(c: Context) -> list[str]:
    out = []
    terms = c.findings["effects"]["terms"]
    for endpoint in dict.fromkeys(t["endpoint"] for t in terms):
        own = [t for t in terms if t["endpoint"] == endpoint and t["p_adjusted"] < 0.05]
        names = [" × ".join(short(x) for x in t["term"]) for t in sorted(own, key=lambda t: -t["omega2"])]
        tested = f"F tests find an effect of {', '.join(names)}" if names else "no F test finds an effect"
        out.append(f"{cap(label_of(endpoint))}: {tested} (adjusted p < .05).{_by_level(c, endpoint, own)}")
        held = [short(t["term"][0]) for t in terms if t["endpoint"] == endpoint and t["suppressed"]]
        if held:
            out.append(
                f"{', '.join(held)} cannot be read alone for {label_of(endpoint)}: an interaction is significant. "
                "Simple effects are listed."
            )
    out += [
        f"{cap(label_of(w['endpoint']))} is not analysed: {w['reason']}." for w in c.findings["effects"]["withheld"]
    ]
    if any(t["unit"] == "runs" for t in terms):
        out.append(
            "Seeds did not all run the same cells, so F tests take runs as the unit: a factor whose effect differs by "
            "seed passes them too often."
        )
    q = c.quality.short
    diverged = sum(e["kept"] for e in c.findings["exclusions"])
    if diverged:
        out.append(
            f"Diverged runs ({diverged}) count with the untrained model's {q}, which widens every interval on {q}."
        )
    out.append(
        "Intervals of ω² resample seeds; in simulated studies they cover 78% at three seeds and 87% at eight, not 95%."
    )
    return out


def _by_level(c: Context, endpoint: str, terms: list[dict[str, Any]]) -> str:
    """Return the verdicts on the levels of the factors whose test is significant, "" where there are none."""
    factors = {t["term"][0] for t in terms if len(t["term"]) == 1}
    found = [
        f"{f['arm_label']} against {f['reference_label']} {f['verdict']}"
        for f in c.findings["findings"]
        if f["family"] == "factors" and f["endpoint"] == endpoint and f.get("factor") in factors
    ]
    if not found:
        return ""
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return (
        " An F test asks whether a factor has any effect, a verdict whether one level differs after adjustment: "
        f"{'; '.join(found[:6])}{more}."
    )


def _importance_figure(view: View, terms: list[dict[str, Any]]) -> None:
    endpoints = list(dict.fromkeys(t["endpoint"] for t in terms))
    ranked: dict[tuple[str, ...], float] = {}
    for t in terms:
        ranked[tuple(t["term"])] = max(ranked.get(tuple(t["term"]), -1.0), t["omega2"])
    order = sorted(ranked, key=lambda k: (ranked[k], k))[-16:]
    figure = new(7.2, 0.32 * len(order) + 1.2)
    ax = figure.subplots()
    plot: list[dict[str, Any]] = []
    for j, endpoint in enumerate(endpoints):
        y, x, low, high = [], [], [], []
        for i, term in enumerate(order):
            for t in terms:
                if tuple(t["term"]) == term and t["endpoint"] == endpoint:
                    place = i + 0.32 * ((len(endpoints) - 1) / 2 - j)
                    y.append(place)
                    x.append(t["omega2"])
                    low.append(max(0.0, t["omega2"] - t["interval"][0]) if t["interval"] else 0.0)
                    high.append(max(0.0, t["interval"][1] - t["omega2"]) if t["interval"] else 0.0)
        ax.errorbar(
            x,
            y,
            xerr=[low, high],
            fmt=MARKERS[j],
            color=COLOURS[j],
            capsize=2.5,
            linewidth=1.4,
            markersize=6,
            label=label_of(endpoint),
        )
        names = [" × ".join(short(t) for t in term) for term in order]
        plot.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label_of(endpoint),
                "x": x,
                "y": y,
                "text": names,
                "marker": {"color": COLOURS[j], "size": 9, "symbol": ["circle", "square"][j % 2]},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": high,
                    "arrayminus": low,
                    "color": COLOURS[j],
                    "thickness": 1.4,
                },
                "hovertemplate": "%{text}<br>ω² %{x:.3f}<extra></extra>",
            }
        )
    zero(ax)
    names = [" × ".join(short(t) for t in term) for term in order]
    ax.set_yticks(range(len(order)), names)
    ax.set_xlabel("partial ω² (share of variance it explains beside the rest), 95% seed bootstrap")
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=len(endpoints))
    view.figures.append(("importance", "How much each factor and interaction explains", figure))
    layout = {
        "xaxis": {"title": {"text": "partial ω²"}},
        "yaxis": {"tickvals": list(range(len(order))), "ticktext": names, "automargin": True},
    }
    view.plots.append(("importance", {"data": plot, "layout": layout | {"height": 34 * len(order) + 160}}))


def _level_figure(c: Context, view: View) -> None:
    found = [f for f in c.findings["findings"] if f["family"] == "factors"]
    endpoints = [e for e in ENDPOINTS if any(f["endpoint"] == e for f in found)]
    if not found:
        return
    view.data["level_effects"] = pl.DataFrame(
        [
            {
                "endpoint": f["endpoint"],
                "kind": f["kind"],
                "choice": f["arm_label"],
                "against": f["reference_label"],
                "effect": f["effect"],
                "low": f["interval"][0],
                "high": f["interval"][1],
                "p_adjusted": f["p_adjusted"],
                "n": f["n"],
            }
            for f in found
        ]
    )
    counts = [min(18, sum(f["endpoint"] == e for f in found)) for e in endpoints]
    figure = new(NARROW, 0.4 * sum(counts) + 1.0 * len(endpoints))
    axes = np.atleast_1d(figure.subplots(len(endpoints), 1, gridspec_kw={"height_ratios": counts}))
    for ax, endpoint in zip(axes, endpoints, strict=True):
        own = [f for f in found if f["endpoint"] == endpoint][:18][::-1]
        zero(ax)
        for i, f in enumerate(own):
            colour = VERDICT_COLOUR[f["verdict"]]
            ax.plot(f["interval"], [i, i], color=colour, linewidth=1.4)
            ax.plot(f["effect"], i, VERDICT_MARK[f["verdict"]], color=colour, markersize=5)
        rows_above(ax, [versus(f["arm_label"], f["reference_label"]) for f in own])
        ax.set_xlabel(f"change in {label_of(endpoint)}")
        ax.grid(axis="y", visible=False)
    view.figures.append(
        (
            "level_effects",
            "Levels against their base level (marks as in the verdicts); simple effects where an interaction is significant",
            figure,
        )
    )
