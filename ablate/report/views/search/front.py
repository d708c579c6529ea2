"""The front of a search: candidates that no other beats in every objective, and how sure that is."""

from __future__ import annotations

from typing import Any

import polars as pl

from ablate.config.endpoints import label_of
from ablate.report.context import Context
from ablate.report.draw import cut_poor_end, few_ticks, legend, mark, name_marks, plotly_mark, wrap
from ablate.report.parts import View
from ablate.report.style import MUTED, new
from ablate.report.views.search.words import axis, better, nothing, objectives, short_names, sound

LIKELY = 0.1  # probability of being on the front from which a candidate is drawn with its interval


def front(c: Context) -> View:
    """Candidates' means over two objectives at a time, with intervals, fresh means and the front as a step line."""
    view = View(
        "front", "Pareto front", "Which candidates does no other beat in every objective, and how sure is that?"
    )
    known = objectives(c)
    if len(known) < 2:
        view.missing = "The search has one objective, so there is no front; the candidates' order is above."
        return view
    rows = sound(c)
    if not rows:
        view.missing = nothing(c)
        return view
    on = [r["arm"] for r in rows if r["on_front"]]
    view.reading.append(f"On the front by their racing means: {short_names(on, 10)}.")
    if rows[0]["probability"] is None:
        view.reading.append("Every candidate has one seed, so how sure the front is cannot be said.")
    else:
        likely = [r["arm"] for r in rows if r["probability"] >= 0.5]
        view.reading.append(
            f"In at least half of 1,000 draws of all means within their noise no candidate beats {short_names(likely, 10)}."
            if likely
            else "No candidate is on the front in half of the draws of all means within their noise."
        )
    pairs = [(known[0], o) for o in known[1:]]
    figure = new(7.2, 4.4) if len(pairs) == 1 else new(7.6, 3.4)
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for k, (ax, (quality, other)) in enumerate(zip(axes, pairs, strict=True)):
        _scatter(c, ax, rows, quality, other, first=k == 0)
    legend(figure, c.styles, columns=4)
    for ax, (quality, other) in zip(axes, pairs, strict=True):
        means = [(r["arm"], r["racing"][other]["mean"], r["racing"][quality]["mean"]) for r in rows if r["on_front"]]
        name_marks(figure, ax, [(wrap(arm, 12, 1), x, y) for arm, x, y in means])
    caption = (
        "Racing means of the candidates. Step line: the front, with names where there is room. Bars: 95% intervals of the "
        "candidates in the legend and of those that may be on the front. Squares round a mark: the same candidate on fresh seeds"
    )
    view.figures.append(("front", caption, figure))
    if len(pairs) == 1:
        view.plots.append(("front", _plot(c, rows, *pairs[0])))
    view.data["front"] = pl.DataFrame(
        [
            {"arm": r["arm"], **{o: r["racing"][o]["mean"] for o in known}}
            | {"on_front": r["on_front"], "probability": r["probability"]}
            for r in rows
        ]
    )
    return view


def _scatter(c: Context, ax: Any, rows: list[dict[str, Any]], quality: str, other: str, *, first: bool) -> None:
    for r in rows[::-1]:
        style = c.styles.arms[r["arm"]]
        x, y = r["racing"][other], r["racing"][quality]
        likely = r["arm"] in c.leading or (r["probability"] or 0) >= LIKELY
        if likely and x["interval"] and y["interval"]:
            ax.plot(x["interval"], [y["mean"]] * 2, color=style.colour, linewidth=0.8, alpha=0.7)
            ax.plot([x["mean"]] * 2, y["interval"], color=style.colour, linewidth=0.8, alpha=0.7)
        look = {"markersize": 6 if likely else 3.5, "alpha": 1.0 if likely else 0.5}
        ax.plot(x["mean"], y["mean"], linestyle="none", **look, **mark(style))
        if r["fresh"]:
            at = r["fresh"][other]["mean"], r["fresh"][quality]["mean"]
            ax.plot([x["mean"], at[0]], [y["mean"], at[1]], ":", color=style.colour, linewidth=1)
            ax.plot(*at, "s", markersize=9, markerfacecolor="none", color=style.colour)
            ax.plot(*at, linestyle="none", markersize=4, **mark(style))
    step = _steps(c, rows, quality, other)
    if first:
        ax.step(*step, where="pre" if better(c, other) == "higher" else "post", color=MUTED, linewidth=0.9, zorder=1)
    _limits(c, ax, rows, quality)
    ax.set_xlabel(axis(c, other))
    ax.set_ylabel(axis(c, quality))
    few_ticks(ax)


def _steps(c: Context, rows: list[dict[str, Any]], quality: str, other: str) -> tuple[list[float], list[float]]:
    on = sorted((r["racing"][other]["mean"], r["racing"][quality]["mean"]) for r in rows if r["on_front"])
    return [x for x, _ in on], [y for _, y in on]


def _limits(c: Context, ax: Any, rows: list[dict[str, Any]], quality: str) -> None:
    """One poor candidate must not flatten the others."""
    if quality == c.quality.name:
        cut_poor_end(ax, [r["racing"][quality]["mean"] for r in rows], c.quality.sign)


def _plot(c: Context, rows: list[dict[str, Any]], quality: str, other: str) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    groups = [([r for r in rows if r["arm"] == a], a) for a in c.leading]
    groups.append(([r for r in rows if r["arm"] not in c.leading], "other candidates"))
    for members, name in groups:
        if not members:
            continue
        bars = {
            key: {
                "type": "data",
                "array": [r["racing"][o]["interval"][1] - r["racing"][o]["mean"] for r in members],
                "thickness": 1,
                "width": 3,
            }
            for key, o in (("error_x", other), ("error_y", quality))
            if len(members) == 1 and members[0]["racing"][o]["interval"]
        }
        chance = ["" if r["probability"] is None else f", P(not beaten) {r['probability']:.2f}" for r in members]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [r["racing"][other]["mean"] for r in members],
                "y": [r["racing"][quality]["mean"] for r in members],
                "text": [
                    f"{r['arm']}, {r['racing'][quality]['n']} racing seeds{p}"
                    for r, p in zip(members, chance, strict=True)
                ],
                "marker": plotly_mark(c.styles.arms[members[0]["arm"]], 9 if len(members) == 1 else 6),
                "hovertemplate": f"%{{text}}<br>{other} %{{x:.3f}}, {quality} %{{y:.4f}}<extra></extra>",
                **bars,
            }
        )
    x, y = _steps(c, rows, quality, other)
    shape = "vh" if better(c, other) == "higher" else "hv"
    line = {"color": MUTED, "width": 1, "shape": shape}
    traces.append(
        {"type": "scatter", "mode": "lines", "name": "front", "x": x, "y": y, "line": line, "hoverinfo": "skip"}
    )
    fresh = [r for r in rows if r["fresh"]]
    if fresh:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "on fresh seeds",
                "x": [r["fresh"][other]["mean"] for r in fresh],
                "y": [r["fresh"][quality]["mean"] for r in fresh],
                "text": [f"{r['arm']} on {r['fresh'][quality]['n']} fresh seeds" for r in fresh],
                "marker": {
                    "symbol": "square-open",
                    "size": 14,
                    "color": [c.styles.arms[r["arm"]].colour for r in fresh],
                },
                "hovertemplate": f"%{{text}}<br>{other} %{{x:.3f}}, {quality} %{{y:.4f}}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": f"{label_of(other)} ({better(c, other)} is better)"}},
        "yaxis": {"title": {"text": f"{label_of(quality)} ({better(c, quality)} is better)"}},
        "height": 520,
    }
    return {"data": traces, "layout": layout}
