"""Parallel coordinates of the search alone: every candidate over its settings and objectives."""

from __future__ import annotations

from typing import Any

import numpy as np

from ablate.analysis.search.candidates import same
from ablate.analysis.search.story import text
from ablate.report.context import Context
from ablate.report.draw import legend, wrap
from ablate.report.parts import View
from ablate.report.style import INK, MUTED, PAPER, RUNS_AS_LINES, new
from ablate.report.views.search.words import nothing, objectives, sound
from ablate.report.wording import short

MOST = 9  # settings that are drawn
Places = tuple[list[float], list[tuple[float, str]]]
"""Where each candidate is on an axis, 0..1 (-0.15 where the setting plays no part), and the ticks."""


def coordinates(c: Context) -> View:
    """A line a candidate over settings and means, the leading ones in their colours."""
    view = View("search_parallel", "Parallel coordinates", "What do the good candidates have in common?")
    rows, names = sound(c), _names(c)
    if len(rows) < 2 or not names:
        view.missing = (
            nothing(c) if not rows else "Only one candidate or no setting that varies: there is nothing to compare."
        )
        return view
    known = objectives(c)
    columns = [_column([r["settings"].get(f) for r in rows]) for f in names]
    columns += [_numbers([r["racing"][o]["mean"] for r in rows]) for o in known]
    titles = [*((f, short(f)) for f in names), *((o, o) for o in known)]
    figure = new(7.8, 3.8)
    ax = figure.subplots()
    lead = [i for i, r in enumerate(rows) if r["arm"] in c.leading]
    for i in [*(i for i in range(len(rows)) if i not in lead), *lead]:
        style = c.styles.arms[rows[i]["arm"]]
        bold = i in lead
        ax.plot(
            range(len(columns)),
            [places[i] for places, _ in columns],
            color=style.colour if bold else MUTED,
            linewidth=1.8 if bold else 0.7,
            alpha=0.95 if bold else max(0.12, min(0.5, 25 / len(rows))),
            zorder=3 if bold else 2,
            rasterized=len(rows) > RUNS_AS_LINES and not bold,
        )
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    for j, (_, ticks) in enumerate(columns):
        ax.axvline(j, color=MUTED, linewidth=0.9, zorder=1)
        for place, name in ticks:
            ax.text(j + 0.03, place, wrap(name, 12, 1), fontsize=6.5, color=INK, va="center", zorder=4, bbox=box)
    ax.set_xticks(range(len(columns)), [wrap(t, 11) for _, t in titles])
    ax.set_xlim(-0.2, len(columns) - 0.45)
    ax.set_ylim(-0.22, 1.08)
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    legend(figure, c.styles, lines=True, columns=4)
    view.figures.append(
        ("search_parallel", "A line a candidate; a setting that plays no part is at the bottom, as –", figure)
    )
    view.plots.append(("search_parallel", _plot(c, rows, columns, titles)))
    lost = len(c.findings["search"]["candidates"]) - len(rows)
    if lost:
        view.reading.append(f"Not drawn, for a run diverged or none ended: {lost} of {lost + len(rows)} candidates.")
    if len(c.findings["search"]["factors"]) > len(names):
        view.reading.append(
            f"Drawn: the {len(names)} most important settings; all of them are in the table of candidates."
        )
    return view


def _names(c: Context) -> list[str]:
    """Settings to draw: all, or the most important ones in the study's order."""
    known = [str(f) for f in c.findings["search"]["factors"]]
    if len(known) <= MOST:
        return known
    leading = list(dict.fromkeys([r["factor"] for r in c.findings["importance"]] + known))[:MOST]
    return [f for f in known if f in leading]


def _column(values: list[Any]) -> Places:
    known = [v for v in values if v is not None]
    if known and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in known):
        places, ticks = _numbers(values)
    else:
        levels: list[Any] = []
        for v in known:
            if not any(same(v, level) for level in levels):
                levels.append(v)
        levels.sort(key=text)
        at = {text(v): i / max(1, len(levels) - 1) for i, v in enumerate(levels)}
        places = [-0.15 if v is None else at[text(v)] for v in values]
        ticks = [(p, name) for name, p in at.items()]
    if len(known) < len(values):
        ticks = [(-0.15, "–"), *ticks]
    return places, ticks


def _numbers(values: list[Any]) -> Places:
    known = np.array([v for v in values if v is not None], dtype=float)
    low, high = float(known.min()), float(known.max())
    log = low > 0 and high / low > 20
    scale = (lambda v: float(np.log(v))) if log else float
    span = max(scale(high) - scale(low), 1e-12)
    places = [-0.15 if v is None else (scale(v) - scale(low)) / span for v in values]
    return places, [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if high > low else [(0.0, f"{low:.4g}")]


def _plot(
    c: Context, rows: list[dict[str, Any]], columns: list[Places], titles: list[tuple[str, str]]
) -> dict[str, Any]:
    """The same lines with the candidates' names; the leading ones can be switched off one by one."""
    data = []
    for group in [*([a] for a in c.leading), [r["arm"] for r in rows if r["arm"] not in c.leading]]:
        at = [i for i, r in enumerate(rows) if r["arm"] in group]
        if not at:
            continue
        lead = len(group) == 1 and group[0] in c.leading
        style = c.styles.arms[group[0]]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": group[0] if lead else "other candidates",
                "x": [x for _ in at for x in [*range(len(columns)), None]],
                "y": [y for i in at for y in [*(places[i] for places, _ in columns), None]],
                "text": [t for i in at for t in [*(_told(rows[i], title, k) for k, title in titles), ""]],
                "line": {"color": style.colour, "width": 2.2 if lead else 0.7},
                "marker": {"color": style.colour, "size": 6 if lead else 3},
                "opacity": 1 if lead else 0.35,
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    names = {"tickvals": list(range(len(columns))), "ticktext": [wrap(t, 14, 1) for _, t in titles]}
    ticks = [
        {
            "x": j,
            "y": place,
            "text": wrap(name, 14, 1),
            "xanchor": "left",
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 10},
        }
        for j, (_, known) in enumerate(columns)
        for place, name in known
    ]
    layout = {
        "xaxis": {**names, "showgrid": True},
        "yaxis": {"visible": False, "range": [-0.2, 1.06]},
        "annotations": ticks,
        "height": 480,
    }
    return {"data": data[::-1], "layout": layout}


def _told(r: dict[str, Any], title: str, key: str) -> str:
    """A candidate's name and its value on one axis."""
    value = r["settings"].get(key) if key not in r["racing"] else r["racing"][key]["mean"]
    return f"{r['arm']}: {title} {text(value)}"
