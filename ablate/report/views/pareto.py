"""Balance against quality."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ablate.config.endpoints import RESTORED
from ablate.report.context import Context
from ablate.report.draw import ellipse, legend, mark, plain, plotly_mark, poor_end
from ablate.report.parts import Table, View
from ablate.report.style import DASHES, INK, MUTED, PLOTLY_DASHES, ArmStyle, new
from ablate.report.tables import absent, columns

SEED_DOTS = 1500  # runs drawn one by one; above that, arm means only


def pareto(c: Context) -> View:
    """Show balance against quality, seeds as dots, dense controls as lines."""
    view = View("pareto", "Balance against quality", f"Is balance paid for in {c.quality.label}?")
    found = c.findings["pareto"]
    if not found:
        view.missing = absent(c, f"No run with both {c.quality.short} and balance")
        return view
    q = c.quality
    ended = c.outcomes.filter(pl.col(q.name).is_not_null() & pl.col(c.balance.name).is_not_null())
    runs = ended.select("arm", "seed", "trial", "run_id", "status", c.balance.name, q.name).sort("arm", "seed")
    view.data["pareto"] = runs
    rows = _rows(c, found["arms"])
    sure = [r["arm"] for r in rows if r["probability"] >= 0.5]
    if sure:
        names = ", ".join(sure[:6]) + (" and others" if len(sure) > 6 else "")
        view.reading.append(f"Not beaten on both axes in at least half of the seed resamples: {names}.")
    else:
        view.reading.append("No arm is on the front in half of the seed resamples.")
    _figure(c, view, found["arms"], runs.filter(pl.col("status") == "finished"))
    view.tables.append(_table(c, rows))
    point, (low, high) = found["reference_point"], found["interval"]
    view.reading.append(
        f"Hypervolume, the area between the front and an untrained model ({q.short} {point[q.name]:.3f}) without balance: "
        f"{found['hypervolume']:.4f} ({low:.4f} to {high:.4f} over seed resamples). More is better; compare it within one task."
    )
    lost = sum(e["kept"] for e in c.findings["exclusions"])
    if lost:
        view.reading.append(
            f"Diverged runs ({lost}) count in the table with the untrained model's {q.short} and are not drawn."
        )
    return view


def _rows(c: Context, arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm, the surest member of the front first."""
    rows = [
        {"arm": c.labels[r["arm"]], "front": "yes" if r["on_front"] else "no", "runs": r["run_ids"]}
        | {key: r[key] for key in (c.balance.name, c.quality.name, "probability", "n")}
        for r in arms
    ]
    return sorted(rows, key=lambda r: (-r["probability"], c.quality.sign * r[c.quality.name]))


def _table(c: Context, rows: list[dict[str, Any]]) -> Table:
    resamples = "share of 1,000 seed resamples in which no other arm beats it on both"
    measured = {e.name: (e.name, e.form) for e in (c.balance, c.quality)}
    head = columns(**measured, front="on the front", probability=("P(not beaten)", ".2f", resamples))
    return Table("pareto_front", "Who is beaten on both, and how sure that is", head, rows)


def _figure(c: Context, view: View, arms: list[dict[str, Any]], finished: pl.DataFrame) -> None:
    """Arms as marks, controls as lines, the front as steps; and the same for the page."""
    figure = new(7.2, 4.9)
    ax = figure.subplots()
    dots = finished.height <= SEED_DOTS
    quality = c.quality
    axes = {
        e.name: f"{e.label} ({side} is better"
        for e, side in ((c.balance, "right"), (quality, "down" if quality.better == "lower" else "up"))
    }
    if not finished.is_empty():
        traces = _marks(c, ax, arms, finished, dots)
        values = finished[quality.name].to_numpy()
        bottom, top = _range(c, values)
        off, side = (values > top, "above") if quality.better == "lower" else (values < bottom, "under")
        if off.any():
            view.reading.append(f"Finished runs {side} the drawn range ({int(off.sum())}) are in the table only.")
        pad = 0.06 * max(top - max(float(values.min()), bottom), 1e-3)
        ax.set_ylim(bottom - pad, top + pad)
        traces += _lines(c, ax)
        drawn = set(finished["arm"])
        front = sorted((r for r in arms if r["on_front"] and r["arm"] in drawn), key=lambda r: r[c.balance.name])
        x, y = [r[c.balance.name] for r in front], [r[quality.name] for r in front]
        ax.step(x, y, where="pre", color=MUTED, linewidth=0.9, zorder=1)
        ax.axvline(RESTORED, color=MUTED, linewidth=0.8, linestyle=":")
        traces += _extent(c, finished, x, y)
        layout = {
            "xaxis": {"title": {"text": f"{axes[c.balance.name]}; dotted: {RESTORED:g})"}, "range": [0, 1.02]},
            "yaxis": {"title": {"text": f"{axes[quality.name]})"}, "range": [bottom - pad, top + pad]},
            "shapes": [_dotted()],
            "height": 560,
        }
        view.plots.append(("pareto", {"data": traces, "layout": layout}))
    ax.set_xlim(0, 1.02)
    ax.set_xlabel(f"{axes[c.balance.name]}; dotted: {RESTORED:g})")
    ax.set_ylabel(f"{axes[quality.name]})")
    legend(figure, c.styles, columns=3, controls=False)  # lines, named where they are drawn
    what = (
        "small marks are seeds, large ones means (from five seeds on with their 95% ellipse)"
        if dots
        else "marks are means over seeds"
    )
    view.figures.append(("pareto", f"Balance against quality: {what}; step line: arms no other beats on both", figure))


def _range(c: Context, values: NDArray[np.float64]) -> tuple[float, float]:
    """Lowest and highest value drawn: one poor arm must not flatten the others, so four usual spreads are the most."""
    lines = _controls(c).values()
    limit = poor_end(values, c.quality.sign)
    low, high = float(values.min()), float(values.max())
    low, high = (low, min(high, limit)) if c.quality.better == "lower" else (max(low, limit), high)
    return min([low, *lines]), max([high, *lines])


def _marks(
    c: Context, ax: Axes, arms: list[dict[str, Any]], finished: pl.DataFrame, dots: bool
) -> list[dict[str, Any]]:
    """Draw every arm's mean, its seeds where `dots`, and its ellipse; returns plotly's traces."""
    groups = {k[0]: g for k, g in finished.partition_by("arm", as_dict=True, maintain_order=True).items()}
    front = {r["arm"] for r in arms if r["on_front"]}
    shown = [a for a in c.order if a in groups and (dots or len(groups) <= 400 or a in front or a in c.shown)]
    traces = []
    for arm in shown:
        x, y, style = groups[arm][c.balance.name].to_list(), groups[arm][c.quality.name].to_list(), c.styles.arms[arm]
        if dots:
            ax.plot(x, y, linestyle="none", markersize=4.5, alpha=0.8, **mark(style))
        ax.plot(np.mean(x), np.mean(y), linestyle="none", markersize=9 if dots else 4, **mark(style))
        ring = ellipse(x, y) if len(groups) <= 24 else None
        if ring:
            ax.plot(*ring, color=style.colour, linewidth=0.7, alpha=0.6, linestyle=DASHES[style.dash])
        traces.append(_dots(c, groups[arm], c.labels[arm], style, dots, len(shown) <= 24))
    return traces


def _dotted() -> dict[str, Any]:
    """A vertical line at the least balance of a balanced tree, for plotly."""
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    return {"type": "line", "x0": RESTORED, "x1": RESTORED, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _extent(c: Context, finished: pl.DataFrame, x: list[float], y: list[float]) -> list[dict[str, Any]]:
    """The front as steps and the arms' ellipses, for plotly."""
    look: dict[str, Any] = {"type": "scatter", "mode": "lines", "hoverinfo": "skip"}
    front = {"color": MUTED, "width": 1, "shape": "vh"}
    traces = [{**look, "name": "not beaten on both", "x": x, "y": y, "line": front}]
    groups = finished.partition_by("arm", as_dict=True, maintain_order=True)
    for (arm,), rows in groups.items() if len(groups) <= 24 else ():
        ring = ellipse(rows[c.balance.name].to_list(), rows[c.quality.name].to_list())
        if ring:
            line = {"color": c.styles.arms[arm].colour, "width": 1}
            traces.append({**look, "x": ring[0].tolist(), "y": ring[1].tolist(), "line": line, "showlegend": False})
    return traces


def _lines(c: Context, ax: Axes) -> list[dict[str, Any]]:
    """Draw a named line for each dense control; returns plotly's traces."""
    traces = []
    for k, (name, value) in enumerate(_controls(c).items()):
        ax.axhline(value, color=INK, linewidth=1.1, linestyle=DASHES[1 + k % 3])
        ax.annotate(name, (0.005, value), xycoords=("axes fraction", "data"), fontsize=7.5, color=MUTED, va="bottom")
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": plain(name),
                "x": [0, 1],
                "y": [value, value],
                "line": {"color": INK, "width": 1.2, "dash": PLOTLY_DASHES[1 + k % 3]},
                "hovertemplate": f"{plain(name)}: %{{y:.4f}}<extra></extra>",
            }
        )
    return traces


def _dots(c: Context, group: pl.DataFrame, label: str, style: ArmStyle, dots: bool, named: bool) -> dict[str, Any]:
    """One arm's plotly trace: every seed where they are drawn, and the mean, larger."""
    x, y = group[c.balance.name].to_list(), group[c.quality.name].to_list()
    text = [f"seed {s}, run {i[:8]}" for s, i in zip(group["seed"], group["run_id"], strict=True)] if dots else []
    many = len(x) if dots else 0
    marker = plotly_mark(style) | {"size": [8] * many + [13]}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(label),
        "x": [*x[:many], float(np.mean(x))],
        "y": [*y[:many], float(np.mean(y))],
        "text": [*text, f"mean of {len(x)}"],
        "marker": marker,
        "showlegend": named,
        "hovertemplate": f"%{{text}}<br>{c.balance.short} %{{x:{c.balance.form}}}, {c.quality.short} %{{y:{c.quality.form}}}<extra>"
        + plain(label)
        + "</extra>",
    }


def _controls(c: Context) -> dict[str, float]:
    out = {}
    for a in c.findings["arms"]:
        # Those in an arm's own activation are in the section on controls.
        if a["kind"] == "control" and a[c.quality.name] and " " not in a["arm"]:
            out[a["label"]] = a[c.quality.name]["mean"]
    return out
