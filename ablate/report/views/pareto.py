"""Balance against quality."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import ellipse, legend, mark, plain, plotly_mark
from ablate.report.parts import Column, Table, View
from ablate.report.style import DASHES, INK, MUTED, ArmStyle, new

SEED_DOTS = 1500  # runs drawn one by one; above that, arm means only


def pareto(c: Context) -> View:
    """Balance against quality, seeds as dots, dense controls as lines."""
    view = View("pareto", "Balance against quality", "Is balance paid for in bits per byte?")
    found = c.findings["pareto"]
    if not found:
        view.missing = f"No run with both bpb and balance: run `ablate study run studies/{c.tables.name}.yaml`."
        return view
    ended = c.outcomes.filter(pl.col("bpb").is_not_null() & pl.col("n_eff_frac").is_not_null())
    finished = ended.filter(pl.col("status") == "finished").sort("arm", "seed")
    view.data["pareto"] = ended.select("arm", "seed", "trial", "run_id", "status", "n_eff_frac", "bpb").sort(
        "arm", "seed"
    )
    figure = new(7.2, 4.9)
    ax = figure.subplots()
    traces: list[dict[str, Any]] = []
    groups = {k[0]: g for k, g in finished.partition_by("arm", as_dict=True, maintain_order=True).items()}
    dots = finished.height <= SEED_DOTS
    on_front = {r["arm"] for r in found["arms"] if r["on_front"]}
    shown = [a for a in c.order if a in groups and (dots or len(groups) <= 400 or a in on_front or a in c.shown)]
    for arm in shown:
        x, y, style = groups[arm]["n_eff_frac"].to_list(), groups[arm]["bpb"].to_list(), c.styles.arms[arm]
        if dots:
            ax.plot(x, y, linestyle="none", markersize=4.5, alpha=0.8, **mark(style))
        ax.plot(np.mean(x), np.mean(y), linestyle="none", markersize=9 if dots else 4, **mark(style))
        ring = ellipse(x, y) if len(groups) <= 24 else None
        if ring:
            ax.plot(*ring, color=style.colour, linewidth=0.7, alpha=0.6, linestyle=DASHES[style.dash])
        label = c.labels[arm]
        traces.append(_dots(groups[arm], label, style, dots, len(shown) <= 24))
    if len(groups):
        values = finished["bpb"].to_numpy()
        low, high = float(values.min()), float(values.max())
        # One poor arm must not flatten the others: beyond four usual spreads it is named instead of drawn.
        q1, q3 = np.quantile(values, [0.25, 0.75])
        top = min(high, float(q3 + 4 * max(q3 - q1, 1e-3)))
        controls = _controls(c)
        top = max([top, *controls.values()]) if controls else top
        pad = 0.06 * max(top - low, 1e-3)
        bottom = min([low, *controls.values()]) if controls else low
        ax.set_ylim(bottom - pad, top + pad)
        for k, (name, value) in enumerate(controls.items()):
            ax.axhline(value, color=INK, linewidth=1.1, linestyle=DASHES[1 + k % 3])
            ax.annotate(
                name, (0.005, value), xycoords=("axes fraction", "data"), fontsize=7.5, color=MUTED, va="bottom"
            )
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": plain(name),
                    "x": [0, 1],
                    "y": [value, value],
                    "line": {"color": INK, "width": 1.2, "dash": ["dash", "dot", "dashdot"][k % 3]},
                    "hovertemplate": f"{plain(name)}: %{{y:.4f}}<extra></extra>",
                }
            )
        off = int((values > top).sum())
        if off:
            view.reading.append(f"{off} finished run(s) lie above the drawn range; the table has them.")
        front = sorted(
            (r for r in found["arms"] if r["on_front"] and r["arm"] in groups), key=lambda r: r["n_eff_frac"]
        )
        ax.step(
            [r["n_eff_frac"] for r in front],
            [r["bpb"] for r in front],
            where="pre",
            color=MUTED,
            linewidth=0.9,
            zorder=1,
        )
        ax.axvline(0.8, color=MUTED, linewidth=0.8, linestyle=":")
        layout = {
            "xaxis": {"title": {"text": "effective leaves / L (right is better)"}, "range": [0, 1.02]},
            "yaxis": {"title": {"text": "bits per byte (down is better)"}, "range": [bottom - pad, top + pad]},
            "height": 560,
        }
        view.plots.append(("pareto", {"data": traces, "layout": layout}))
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("effective leaves / L (right is better; dotted: 0.8)")
    ax.set_ylabel("bits per byte (down is better)")
    legend(figure, c.styles, columns=3, controls=False)  # lines, named where they are drawn
    what = (
        "small marks are seeds, large ones means (from five seeds on with their 95% ellipse)"
        if dots
        else "marks are means over seeds"
    )
    view.figures.append(("pareto", f"Balance against quality: {what}; step line: arms no other beats on both", figure))
    rows = sorted(
        (
            {
                "arm": c.labels[r["arm"]],
                **{k: r[k] for k in ("n_eff_frac", "bpb", "probability", "n")},
                "front": "yes" if r["on_front"] else "no",
                "runs": r["run_ids"],
            }
            for r in found["arms"]
        ),
        key=lambda r: (-r["probability"], r["bpb"]),
    )
    columns = [
        Column("arm", "arm"),
        Column("n_eff_frac", "n_eff_frac", ".3f"),
        Column("bpb", "bpb", ".4f"),
        Column("front", "on the front"),
        Column(
            "probability",
            "P(not beaten)",
            ".2f",
            "share of 1,000 seed resamples in which no other arm beats it on both",
        ),
        Column("n", "n", "d"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(Table("pareto_front", "Who is beaten on both, and how sure that is", columns, rows))
    sure = [r["arm"] for r in rows if r["probability"] >= 0.5]
    low_v, high_v = found["interval"]
    names = ", ".join(sure[:6]) + (" and others" if len(sure) > 6 else "")
    if sure:
        view.reading.insert(0, f"Not beaten on both axes in at least half of the seed resamples: {names}.")
    else:
        view.reading.insert(0, "No arm is on the front in half of the seed resamples.")
    point = found["reference_point"]
    view.reading.append(
        f"Hypervolume over (n_eff_frac {point['n_eff_frac']:g}, bpb {point['bpb']:.3f}): {found['hypervolume']:.4f} "
        f"({low_v:.4f} to {high_v:.4f} over seed resamples)."
    )
    lost = [e for e in c.findings["exclusions"] if e["kept"]]
    if lost:
        view.reading.append(
            f"{len(lost)} diverged run(s) count in the table with the untrained model's bpb and are not drawn."
        )
    return view


def _dots(group: pl.DataFrame, label: str, style: ArmStyle, dots: bool, named: bool) -> dict[str, Any]:
    """One arm's plotly trace: every seed where they are drawn, and the mean, larger."""
    x, y = group["n_eff_frac"].to_list(), group["bpb"].to_list()
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
        "hovertemplate": "%{text}<br>n_eff %{x:.3f}, bpb %{y:.4f}<extra>" + plain(label) + "</extra>",
    }


def _controls(c: Context) -> dict[str, float]:
    out = {}
    for a in c.findings["arms"]:
        # Those in an arm's own activation stand in the section on controls.
        if a["kind"] == "control" and a["bpb"] and " " not in a["arm"]:
            out[a["label"]] = a["bpb"]["mean"]
    return out
