"""Views of answers: the verdicts, what each factor does alone, and which factors must be read together."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import note, strip, versus, wrap, zero
from ablate.report.parts import Column, Table, View
from ablate.report.style import COLOURS, DASHES, GRID, MARKERS, MUTED, new

VERDICT_COLOUR = {"supported": "#009e73", "refuted": "#d55e00", "inconclusive": MUTED}
VERDICT_MARK = {"supported": "o", "refuted": "X", "inconclusive": "D"}
DARK, LIGHT = "#101014", "#fefefe"  # on a heat map's own colours, whatever the theme
FOREST = 14  # rows an endpoint has in the forest plot
ENDPOINT = {"bpb": "bits per byte", "n_eff_frac": "effective leaves / L"}


def verdicts(c: Context) -> View:
    """Every comparison with its effect, interval, adjusted p, n and verdict."""
    view = View("verdicts", "Verdicts", "What does this study show, what does it rule out, and what can it not tell?")
    found = c.findings["findings"]
    if not found:
        view.missing = (
            "No comparison could be made: give the study a reference arm or controls and two seeds or more, then run "
            f"`ablate study run studies/{c.tables.name}.yaml`."
        )
        return view
    view.reading = _summary(c)
    main = [f for f in found if f["family"] != "dense"] or found
    rows = [_row(f) for f in sorted(found, key=_importance)]
    columns = [
        Column("choice", "choice"),
        Column("against", "against"),
        Column("endpoint", "endpoint"),
        Column("verdict", "verdict"),
        Column("effect", "effect", "+.4f", "mean difference; seeds are the unit"),
        Column("low", "95% from", "+.4f"),
        Column("high", "to", "+.4f"),
        Column(
            "p_adjusted", "adjusted p", ".3g", "adjusted over the family: Holm in confirm, Benjamini-Hochberg elsewhere"
        ),
        Column("p_sign_flip", "sign-flip p", ".3g", "exact, unadjusted"),
        Column("detectable", "detectable", ".3g", "smallest effect this comparison finds with 80% power"),
        Column("n", "n", "d"),
        Column("claim", "claim"),
        Column("remark", "remark"),
        Column("family", "family"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(Table("verdicts", "All comparisons, supported first", columns, rows))
    for endpoint in ("bpb", "n_eff_frac"):
        shown = sorted((f for f in main if f["endpoint"] == endpoint and f["effect"] is not None), key=_importance)
        if shown:
            _forest(view, endpoint, shown)
    return view


def _importance(f: dict[str, Any]) -> tuple[Any, ...]:
    rank = {"supported": 0, "refuted": 1, "inconclusive": 2}[f["verdict"]]
    first = {"confirm": 0, "factors": 1, "arms": 2, "dense": 3}.get(f["family"], 4)
    return first > 0, rank, first, -abs(f["effect"] or 0.0) / f["margin"], f["id"]


def _row(f: dict[str, Any]) -> dict[str, Any]:
    remarks = list(f["reasons"])
    if f["below_margin"]:
        remarks.insert(0, f"real, but within the margin of {f['margin']:g}")
    kept = f.get("finished_only")
    if kept:
        value = "untestable" if kept["effect"] is None else f"{kept['effect']:+.4f}"
        remarks.append(f"a run diverged; finished runs alone: {value} (n {kept['n']})")
    low, high = f["interval"] or (None, None)
    return {
        "choice": f["arm_label"],
        "against": f["reference_label"],
        "endpoint": f["endpoint"],
        "claim": f"{f['claim']} (margin {f['margin']:g})",
        "effect": f["effect"],
        "low": low,
        "high": high,
        "p_adjusted": f["p_adjusted"],
        "p_sign_flip": f["p_sign_flip"],
        "detectable": f["detectable"],
        "n": f["n"],
        "verdict": f["verdict"],
        "remark": "; ".join(remarks),
        "family": f["family"],
        "runs": f["run_ids"],
    }


def _summary(c: Context) -> list[str]:
    out = []
    found = c.findings["findings"]
    for family in c.findings["families"]:
        own = [f for f in [*found, *c.findings["recovered"]] if f["family"] == family["family"]]
        counts = ", ".join(
            f"{sum(f['verdict'] == v for f in own)} {v}" for v in ("supported", "refuted", "inconclusive")
        )
        method = {"holm": "Holm", "bh": "Benjamini-Hochberg"}[family["adjustment"]]
        out.append(f"{_cap(family['what'])}: {counts} ({family['size']} tests in the family, {method}).")
    if c.findings["design"] != "confirm":
        out.append(
            "This is an exploratory study: it finds candidates. Only a `confirm` study with named contrasts makes claims."
        )
    strongest = sorted((f for f in found if f["verdict"] == "supported" and f["family"] != "dense"), key=_importance)[
        :3
    ]
    out += [f["text"] for f in strongest]
    gap = c.findings["assay"]
    if gap:
        can = "so it can tell layers apart" if gap["sensitive"] else "too few to tell layers apart (3 are needed)"
        out.append(
            f"Dense layers of active and of total size are {gap['gap']:.4f} bpb apart, {gap['margins']:.1f} margins: {can}."
        )
    return out


def _forest(view: View, endpoint: str, shown: list[dict[str, Any]]) -> None:
    rows = shown[:FOREST][::-1]
    figure = new(7.6, 0.34 * len(rows) + 1.3)
    ax = figure.subplots()
    margin = rows[0]["margin"]
    ax.axvspan(-margin, margin, color=GRID, alpha=0.6, zorder=0, linewidth=0)
    zero(ax)
    for i, f in enumerate(rows):
        colour, shape = VERDICT_COLOUR[f["verdict"]], VERDICT_MARK[f["verdict"]]
        ax.plot(f["interval"], [i, i], color=colour, linewidth=1.6)
        ax.plot(f["effect"], i, shape, color=colour, markersize=6)
    # A hopeless interval must not flatten the others.
    reach = np.array([np.abs([f["effect"], *f["interval"]]).max() for f in rows])
    usual = max(float(np.median(reach)) * 4, 3 * margin)
    if reach.max() > usual:
        ax.set_xlim(-usual, usual)
    ax.set_yticks(range(len(rows)), [versus(f["arm_label"], f["reference_label"]) for f in rows])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel(f"difference in {ENDPOINT[endpoint]}, 95% interval\n(grey: within the margin of {margin:g})")
    ax.grid(axis="y", visible=False)
    handles = [ax.plot([], [], VERDICT_MARK[v], color=VERDICT_COLOUR[v], label=v)[0] for v in VERDICT_COLOUR]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    more = f" (first {len(rows)} of {len(shown)})" if len(shown) > len(rows) else ""
    view.figures.append((f"verdicts_{endpoint}", f"Differences in {ENDPOINT[endpoint]}{more}", figure))


def main_effects(c: Context) -> View:
    """Effect of each factor's levels, and partial omega squared of each term."""
    view = View("effects", "Main effects and importance", "Which single choice matters, for balance and for quality?")
    effects = c.findings["effects"]
    if not effects["terms"]:
        view.missing = _no_factors(c)
        _importance_of_search(c, view)
        return view
    short = _short
    rows = [
        {
            "term": " × ".join(short(t) for t in e["term"]),
            "endpoint": e["endpoint"],
            "df": e["df"],
            "f": e["f"],
            "p_adjusted": e["p_adjusted"],
            "omega2": e["omega2"],
            "low": (e["interval"] or [None])[0],
            "high": (e["interval"] or [None, None])[1],
            "n": e["n"],
            "read": "simple effects only" if e["suppressed"] else "stands alone" if len(e["term"]) == 1 else "",
            "runs": e["run_ids"],
        }
        for e in effects["terms"]
    ]
    columns = [
        Column("term", "term"),
        Column("endpoint", "endpoint"),
        Column("df", "df", "d"),
        Column("f", "F (HC3)", ".2f"),
        Column("p_adjusted", "adjusted p", ".3g"),
        Column("omega2", "partial ω²", ".3f"),
        Column("low", "95% from", ".3f"),
        Column("high", "to", ".3f"),
        Column("n", "runs n", "d"),
        Column("read", "how to read"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(Table("terms", "Type II analysis with seeds as blocks; intervals resample seeds", columns, rows))
    view.reading = _effect_reading(c)
    _importance_figure(view, effects["terms"])
    _level_figure(c, view)
    return view


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(factor: str) -> str:
    return factor.partition(".")[2].replace("_", " ")


def _effect_reading(c: Context) -> list[str]:
    out = []
    terms = c.findings["effects"]["terms"]
    for endpoint in dict.fromkeys(t["endpoint"] for t in terms):
        own = [t for t in terms if t["endpoint"] == endpoint and t["p_adjusted"] < 0.05]
        names = [" × ".join(_short(x) for x in t["term"]) for t in sorted(own, key=lambda t: -t["omega2"])]
        out.append(
            f"{_cap(ENDPOINT[endpoint])}: "
            + (f"{', '.join(names)} matter (adjusted p < .05)." if names else "no term stands out.")
        )
        held = [_short(t["term"][0]) for t in terms if t["endpoint"] == endpoint and t["suppressed"]]
        if held:
            out.append(
                f"{', '.join(held)} cannot be read alone for {ENDPOINT[endpoint]}: an interaction stands, so simple effects are listed."
            )
    out += [
        f"{_cap(ENDPOINT[w['endpoint']])} is not analysed: {w['reason']}." for w in c.findings["effects"]["withheld"]
    ]
    diverged = sum(e["kept"] for e in c.findings["exclusions"])
    if diverged:
        out.append(
            f"{diverged} diverged run(s) count with the untrained model's bpb, which widens every interval on bpb."
        )
    out.append(
        "Intervals of ω² resample seeds; in simulated studies they cover 78% at three seeds and 87% at eight, not 95%."
    )
    return out


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
                    place = i + 0.16 - 0.32 * j if len(endpoints) > 1 else i
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
            label=ENDPOINT[endpoint],
        )
        names = [" × ".join(_short(t) for t in term) for term in order]
        plot.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": ENDPOINT[endpoint],
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
    names = [" × ".join(_short(t) for t in term) for term in order]
    ax.set_yticks(range(len(order)), names)
    ax.set_xlabel("partial ω² (share of variance it explains beside the rest), 95% seed bootstrap")
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=2)
    view.figures.append(("importance", "How much each factor and interaction explains", figure))
    layout = {
        "xaxis": {"title": {"text": "partial ω²"}},
        "yaxis": {"tickvals": list(range(len(order))), "ticktext": names, "automargin": True},
    }
    view.plots.append(("importance", {"data": plot, "layout": layout | {"height": 34 * len(order) + 160}}))


def _level_figure(c: Context, view: View) -> None:
    found = [f for f in c.findings["findings"] if f["family"] == "factors"]
    endpoints = [e for e in ENDPOINT if any(f["endpoint"] == e for f in found)]
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
    figure = new(7.6, 0.26 * sum(counts) + 1.0 * len(endpoints))
    axes = np.atleast_1d(figure.subplots(len(endpoints), 1, gridspec_kw={"height_ratios": counts}))
    for ax, endpoint in zip(axes, endpoints, strict=True):
        own = [f for f in found if f["endpoint"] == endpoint][:18][::-1]
        zero(ax)
        for i, f in enumerate(own):
            colour = VERDICT_COLOUR[f["verdict"]]
            ax.plot(f["interval"], [i, i], color=colour, linewidth=1.4)
            ax.plot(f["effect"], i, VERDICT_MARK[f["verdict"]], color=colour, markersize=5)
        ax.set_yticks(range(len(own)), [versus(f["arm_label"], f["reference_label"]) for f in own], fontsize=7.5)
        ax.set_ylim(-0.6, len(own) - 0.4)
        ax.set_xlabel(f"change in {ENDPOINT[endpoint]}")
        ax.grid(axis="y", visible=False)
    view.figures.append(
        (
            "level_effects",
            "Levels against their base level (marks as in the verdicts); simple effects where an interaction stands",
            figure,
        )
    )


def interactions(c: Context) -> View:
    """Strength of each pair, and the cell means behind it."""
    view = View("interactions", "Interactions", "Which choices only work together, or undo each other?")
    effects = c.findings["effects"]
    pairs = [t for t in effects["terms"] if len(t["term"]) == 2]
    if not pairs:
        view.missing = (
            _no_factors(c)
            if not effects["terms"]
            else "One factor only, or a design that cannot tell its interactions apart: use `design: factorial` with two factors or more."
        )
        return view
    names = sorted({x for t in pairs for x in t["term"]}, key=lambda f: list(c.tables.study.factors).index(f))
    endpoints = list(dict.fromkeys(t["endpoint"] for t in pairs))
    across, down = names[:-1], names[1:]
    figure = new(max(5.2, 2.9 * len(endpoints) + 1.2), 0.5 * len(names) + 2.0)
    axes = np.atleast_1d(figure.subplots(1, len(endpoints)))
    for ax, endpoint in zip(axes, endpoints, strict=True):
        grid = np.full((len(down), len(across)), np.nan)
        for t in (t for t in pairs if t["endpoint"] == endpoint):
            a, b = sorted(t["term"], key=names.index)
            i, j, value = across.index(a), down.index(b), max(0.0, t["omega2"])
            grid[j, i] = value
            star = "*" if t["p_adjusted"] < 0.05 else ""
            ax.text(
                i, j, f"{value:.2f}{star}", ha="center", va="center", fontsize=8, color=DARK if value < 0.6 else LIGHT
            )
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        strip(ax)
        ax.set_xticks(range(len(across)), [_short(n) for n in across], rotation=30, ha="right")
        ax.set_yticks(range(len(down)), [_short(n) for n in down] if ax is axes[0] else [""] * len(down))
        ax.set_title(ENDPOINT[endpoint])
    figure.colorbar(image, ax=axes, label="partial ω²", shrink=0.8)
    view.figures.append(("interactions", "Strength of every pair (* adjusted p < .05)", figure))
    view.data["cells"] = pl.DataFrame(
        [
            {
                "endpoint": x["endpoint"],
                "factor_a": x["factors"][0],
                "factor_b": x["factors"][1],
                "level_a": x["levels"][0],
                "level_b": x["levels"][1],
                "mean": x["mean"],
                "n": x["n"],
            }
            for x in effects["cells"]
        ]
    )
    _lines(c, view, pairs)
    standing = [t for t in pairs if t["p_adjusted"] < 0.05]
    view.reading = [
        f"{' × '.join(_short(x) for x in t['term'])} interact on {ENDPOINT[t['endpoint']]} (partial ω² {t['omega2']:.2f}): "
        "neither is read alone."
        for t in standing
    ] or ["No interaction stands after adjustment; main effects can be read alone."]
    if effects["left_out"]:
        view.reading.append(
            f"{len(effects['left_out'])} interaction term(s) cannot be estimated from these runs and are left out."
        )
    view.widgets.append(
        (
            "interactions",
            {
                "cells": effects["cells"],
                "names": {n: _short(n) for n in names},
                "endpoints": {e: ENDPOINT[e] for e in endpoints},
            },
        )
    )
    return view


def _lines(c: Context, view: View, pairs: list[dict[str, Any]]) -> None:
    best = sorted(pairs, key=lambda t: (t["p_adjusted"], -t["omega2"]))[:6]
    figure = new(7.6, 2.5 * ((len(best) + 2) // 3))
    axes = np.atleast_1d(figure.subplots((len(best) + 2) // 3, min(3, len(best)), squeeze=False)).ravel()
    for ax in axes[len(best) :]:
        ax.set_visible(False)
    for ax, t in zip(axes, best, strict=False):
        cells = [
            x
            for x in c.findings["effects"]["cells"]
            if x["endpoint"] == t["endpoint"] and set(x["factors"]) == set(t["term"])
        ]
        if not cells:
            note(ax, "no cell means")
            continue
        across = list(dict.fromkeys(x["levels"][0] for x in cells))
        for k, level in enumerate(dict.fromkeys(x["levels"][1] for x in cells)):
            means = {x["levels"][0]: x["mean"] for x in cells if x["levels"][1] == level}
            ax.plot(
                [across.index(a) for a in across if a in means],
                [means[a] for a in across if a in means],
                marker=MARKERS[k % 8],
                color=COLOURS[k % 8],
                linestyle=DASHES[k % 4],
                label=wrap(level, 14, 1),
            )
        ax.set_xticks(range(len(across)), [wrap(a, 12, 1) for a in across])
        ax.set_xlim(-0.25, len(across) - 0.75)
        ax.set_xlabel(_short(cells[0]["factors"][0]))
        ax.set_title(ENDPOINT[t["endpoint"]] + (" *" if t["p_adjusted"] < 0.05 else ""), fontsize=8.5)
        ax.legend(title=_short(cells[0]["factors"][1]), title_fontsize=7.5, fontsize=7.5)
    view.figures.append(
        ("interaction_lines", "Cell means of the strongest pairs; parallel lines are no interaction", figure)
    )


def _no_factors(c: Context) -> str:
    held = c.findings["effects"]["withheld"]
    if held:
        return " ".join(f"{w['endpoint']} is not analysed: {w['reason']}." for w in held)
    if c.findings["design"] == "factorial":
        return f"No factor has two levels with results yet: run `ablate study run studies/{c.tables.name}.yaml`."
    return (
        f"A `{c.findings['design']}` study has no factorial grid to analyse: write a study with `design: factorial` and run "
        "`ablate study run studies/NAME.yaml`."
    )


def _importance_of_search(c: Context, view: View) -> None:
    rows = c.findings["importance"]
    if not rows:
        return
    view.missing = ""
    columns = [
        Column("factor", "factor"),
        Column("endpoint", "endpoint"),
        Column("measure", "measure"),
        Column("value", "strength", "+.3f"),
        Column("p_adjusted", "adjusted p", ".3g"),
        Column("n", "n", "d"),
    ]
    view.tables.append(Table("importance", "Association of each setting with the outcome", columns, rows))
    view.reading.append(
        "A search chooses its trials and runs each once, so these are leads, not effects: Spearman's correlation for numbers, "
        "epsilon squared (Kruskal-Wallis) for the rest. Confirm candidates with a `confirm` study."
    )
