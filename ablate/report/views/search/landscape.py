"""What the settings do: importances, partial dependence, and maps over two settings, all from the surrogate."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.config.endpoints import label_of
from ablate.report.context import Context
from ablate.report.draw import few_ticks, strip, wrap
from ablate.report.parts import Column, Table, View
from ablate.report.style import COLOURS, MUTED, new
from ablate.report.views.search.words import better, nothing, objectives, sound
from ablate.report.wording import cap, short

FACTORS = 8  # rows of the figure of partial dependence


def importances(c: Context) -> View:
    """Shares of the surrogate's variance, alone and with interactions, with intervals over resampled candidates."""
    view = View("search_importance", "Importance of the settings", "Which settings matter, and for which objective?")
    rows = c.findings["importance"]
    if not rows:
        view.missing = _withheld(c)
        return view
    view.reading = _fit(c)
    for o in _fitted(c):
        own = [r for r in rows if r["endpoint"] == o]
        named = [
            f"{short(r['factor'])} {r['value']:.0%} ({r['interval'][0]:.0%} to {r['interval'][1]:.0%})" for r in own[:3]
        ]
        view.reading.insert(0, f"{cap(label_of(o))}: {', '.join(named)}.")
    view.details = [
        "How to read this",
        "Functional analysis of variance of a Gaussian process fitted to the candidates' mean over seeds, over the space "
        "as the study file gives it. `alone` averages over all other settings; `with interactions` is what goes when the "
        "setting is kept fixed.",
        "Intervals resample candidates. A share is never under 0, so an interval that starts near 0 shows nothing.",
        "The sampler chose the candidates and looked where it was good, so settings may vary together there and poor regions "
        "are thin: two settings that always moved together cannot be separated. Impossible combinations count in the "
        "space as the surrogate guesses them.",
        "These are leads, not effects: an importance has no direction, and a factorial or confirm study tests one.",
    ]
    names = list(dict.fromkeys(r["factor"] for r in rows))
    shown = _fitted(c)
    figure = new(7.2, 0.42 * len(names) + 1.4)
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for k, (ax, o) in enumerate(zip(axes, shown, strict=True)):
        for i, name in enumerate(names[::-1]):
            r = next(r for r in rows if r["factor"] == name and r["endpoint"] == o)
            ax.barh(i, r["value"], height=0.55, color=COLOURS[k], alpha=0.45)
            ax.plot(r["interval"], [i, i], color=COLOURS[k], linewidth=1.6)
            ax.plot(r["total"], i, "o", markersize=5, color=COLOURS[k], markerfacecolor="none")
        ax.set_xlim(0, 1.02)
        ax.set_xlabel("share of the variance")
        ax.set_title(label_of(o))
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(names)), [short(n) for n in names[::-1]])
    caption = "Bars: the setting alone, with 95% intervals; circles: with its interactions"
    view.figures.append(("search_importance", caption, figure))
    view.plots.append(("search_importance", _bars(rows, names, shown)))
    table = [
        {
            **{k: r[k] for k in ("endpoint", "value", "total", "n")},
            "factor": short(r["factor"]),
            "low": r["interval"][0],
            "high": r["interval"][1],
            "total_low": r["total_interval"][0],
            "total_high": r["total_interval"][1],
        }
        for r in rows
    ]
    columns = [
        Column("factor", "setting"),
        Column("endpoint", "objective"),
        Column("value", "alone", ".3f"),
        Column("low", "95% from", ".3f"),
        Column("high", "to", ".3f"),
        Column("total", "with interactions", ".3f"),
        Column("total_low", "95% from", ".3f"),
        Column("total_high", "to", ".3f"),
        Column("n", "candidates", "d"),
    ]
    view.tables.append(Table("search_importance", "Shares of the surrogate's variance", columns, table))
    return view


def _bars(rows: list[dict[str, Any]], names: list[str], shown: list[str]) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for k, o in enumerate(shown):
        own = {r["factor"]: r for r in rows if r["endpoint"] == o}
        up = [max(0.0, own[n]["interval"][1] - own[n]["value"]) for n in names]
        down = [max(0.0, own[n]["value"] - own[n]["interval"][0]) for n in names]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "offsetgroup": o,
                "name": label_of(o),
                "y": [short(n) for n in names],
                "x": [own[n]["value"] for n in names],
                "error_x": {"type": "data", "array": up, "arrayminus": down, "thickness": 1.2},
                "marker": {"color": COLOURS[k]},
                "hovertemplate": f"%{{y}}: %{{x:.3f}} alone<extra>{label_of(o)}</extra>",
            }
        )
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "orientation": "h",
                "offsetgroup": o,
                "showlegend": False,
                "y": [short(n) for n in names],
                "x": [own[n]["total"] for n in names],
                "marker": {"color": COLOURS[k], "symbol": "circle-open", "size": 9},
                "hovertemplate": f"%{{y}}: %{{x:.3f}} with interactions<extra>{label_of(o)}</extra>",
            }
        )
    axes = {
        "xaxis": {"title": {"text": "share of the variance"}, "range": [0, 1.02]},
        "yaxis": {"autorange": "reversed"},
    }
    return {
        "data": data,
        "layout": axes | {"barmode": "group", "scattermode": "group", "height": 46 * len(names) + 160},
    }


def dependence(c: Context) -> View:
    """How each objective changes over each setting, averaged over the other settings of the candidates."""
    view = View(
        "dependence",
        "Partial dependence",
        "How do balance and quality change over each setting, the others as they were?",
    )
    rows = c.findings["search"]["dependence"]
    if not rows:
        view.missing = _withheld(c)
        return view
    view.reading = [
        *_fit(c),
        "The band is the surrogate's 95% interval: wide where no candidate was. Numbers at the bottom count the candidates there.",
    ]
    shown = _fitted(c)
    order = list(dict.fromkeys(r["factor"] for r in c.findings["importance"]))[:FACTORS]
    figure = new(7.4, 1.75 * len(order) + 0.4)
    axes = figure.subplots(len(order), len(shown), squeeze=False, sharey="col")
    for i, name in enumerate(order):
        for k, o in enumerate(shown):
            r = next(r for r in rows if r["factor"] == name and r["objective"] == o)
            _curve(axes[i, k], r, COLOURS[k])
            axes[i, k].set_xlabel(short(name))
            if i == 0:
                axes[i, k].set_title(f"{label_of(o)} ({better(c, o)} is better)")
    caption = "Prediction over one setting, averaged over the candidates' other settings"
    more = "" if len(order) == len({r["factor"] for r in rows}) else f"; the {len(order)} most important"
    view.figures.append(("dependence", caption + more, figure))
    view.data["dependence"] = pl.DataFrame(
        [
            {"objective": r["objective"], "factor": r["factor"], "at": str(a), "mean": m, "low": lo, "high": hi, "n": n}
            for r in rows
            for a, m, lo, hi, n in zip(r["at"], r["mean"], r["low"], r["high"], r["n"], strict=True)
        ]
    )
    return view


def _curve(ax: Any, r: dict[str, Any], colour: str) -> None:
    x = r["at"] if r["ordered"] else list(range(len(r["at"])))
    if r["ordered"]:
        ax.fill_between(x, r["low"], r["high"], color=colour, alpha=0.18, linewidth=0)
        ax.plot(x, r["mean"], color=colour, linewidth=1.5)
        if r["log"]:
            ax.set_xscale("log")
            low, high = x[0], x[-1]
            ax.set_xticks([low, (low * high) ** 0.5, high], [f"{v:.2g}" for v in (low, (low * high) ** 0.5, high)])
            ax.minorticks_off()
        elif len(x) <= 8:
            ax.set_xticks(x, [f"{v:g}" for v in x])
        else:
            few_ticks(ax, count=5)
    else:
        for i, (m, lo, hi) in enumerate(zip(r["mean"], r["low"], r["high"], strict=True)):
            ax.plot([i, i], [lo, hi], color=colour, linewidth=1.4)
            ax.plot(i, m, "o", color=colour, markersize=5)
        ax.set_xticks(x, [wrap(str(a), 12, 2) for a in r["at"]])
        ax.set_xlim(-0.5, len(x) - 0.5)
    for at, n in zip(x, r["n"], strict=True):
        if n:
            ax.text(at, 0.01, n, transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=6, color=MUTED)


def maps(c: Context) -> View:
    """Predictions over two settings at once, empty where no candidate was."""
    view = View("maps", "Maps over two settings", "Where, over depth, width, asymmetry and initialisation, is it good?")
    rows = c.findings["search"]["maps"]
    if not rows:
        view.missing = (
            _withheld(c) if not c.findings["search"]["dependence"] else "Only one setting varies, so there is no pair."
        )
        return view
    view.reading.append(
        "Colour: the surrogate's prediction, averaged over the candidates' other settings; the number counts the candidates "
        "in a cell; a cell without one stays empty."
    )
    for o in _fitted(c):
        own = [r for r in rows if r["objective"] == o]
        if not own:
            continue
        across = min(3, len(own))
        down = -(-len(own) // across)
        figure = new(2.55 * across + 0.5, 2.5 * down + 0.6)
        axes = figure.subplots(down, across, squeeze=False)
        known = [v for r in own for line in r["mean"] for v in line if v is not None]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        for ax in axes.ravel()[len(own) :]:
            ax.set_visible(False)
        pictures = [_map(ax, r, low, high, better(c, o)) for ax, r in zip(axes.ravel(), own, strict=False)]
        figure.colorbar(
            pictures[0], ax=axes.ravel().tolist(), label=f"{label_of(o)} ({better(c, o)} is better)", fraction=0.03
        )
        view.figures.append((f"maps_{o}", f"{cap(label_of(o))} over pairs of settings", figure))
    view.data["maps"] = pl.DataFrame(
        [
            {"objective": r["objective"], "first": r["factors"][0], "second": r["factors"][1], "at": a, "and": b}
            | {"mean": r["mean"][i][j], "n": r["n"][i][j]}
            for r in rows
            for i, a in enumerate(r["levels"][0])
            for j, b in enumerate(r["levels"][1])
        ],
        infer_schema_length=None,
    )
    return view


def _map(ax: Any, r: dict[str, Any], low: float, high: float, side: str) -> Any:
    table = np.array([[np.nan if v is None else v for v in line] for line in r["mean"]], dtype=float).T
    colours = "viridis_r" if side == "lower" else "viridis"
    picture = ax.imshow(table, origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=high)
    span = max(high - low, 1e-12)
    for i, line in enumerate(r["n"]):
        for j, n in enumerate(line):
            if n:
                share = (table[j, i] - low) / span
                bright = share > 0.6 if side == "higher" else share < 0.4
                ax.text(i, j, n, ha="center", va="center", fontsize=6.5, color="#101114" if bright else "#f8f8f8")
    first, second = r["levels"]
    ax.set_xticks(range(len(first)), [wrap(v, 12, 1) for v in first], rotation=45 if max(map(len, first)) > 4 else 0)
    ax.set_yticks(range(len(second)), [wrap(v, 12, 1) for v in second])
    ax.tick_params(labelsize=6.5)
    ax.set_xlabel(short(r["factors"][0]))
    ax.set_ylabel(short(r["factors"][1]))
    strip(ax)
    return picture


def _fitted(c: Context) -> list[str]:
    return [o for o in objectives(c) if any(r["endpoint"] == o for r in c.findings["importance"])]


def _fit(c: Context) -> list[str]:
    out = []
    for r in c.findings["search"]["surrogate"]:
        if r["withheld"]:
            out.append(f"{cap(label_of(r['objective']))}: nothing is said, for {r['withheld']}.")
        elif r["left_out_r2"] < 0.5:
            out.append(
                f"{cap(label_of(r['objective']))}: the surrogate explains only {r['left_out_r2']:.0%} of the differences "
                "between candidates that it has not seen; read it with care."
            )
    return out


def _withheld(c: Context) -> str:
    if not sound(c):
        return nothing(c)
    return " ".join(_fit(c))
