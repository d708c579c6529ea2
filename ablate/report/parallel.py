"""Parallel coordinates: every finished run across its settings and outcomes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ablate.report.context import Context
from ablate.report.draw import wrap
from ablate.report.parts import View
from ablate.report.style import INK, MUTED, PAPER, RUNS_AS_LINES, new


def parallel(c: Context, view: View, rows: list[dict[str, Any]], factors: list[str]) -> None:
    """Draw parallel coordinates of factors, quality and balance, a line for each finished run.

    Of more than 600 runs, an even choice of 600 is drawn.
    """
    q = c.quality.name
    runs = [
        r
        for r in rows
        if r["status"] == "finished" and r["kind"] != "tune" and r[q] is not None and r["n_eff_frac"] is not None
    ]
    if len(runs) < 2 or not factors:
        return
    if len(runs) > 600:
        runs = [runs[i] for i in np.linspace(0, len(runs) - 1, 600).round().astype(int)]
    keys = [*factors[:7], "dead_frac", "n_eff_frac", q]
    figure = new(7.6, 3.6)
    ax = figure.subplots()
    axes = [_levels(ax, j, runs, k) if k in factors else _scale(runs, k) for j, k in enumerate(keys)]
    styles = {c.labels[a]: s for a, s in c.styles.arms.items()}
    rng = np.random.default_rng(0)  # spreads runs of one level apart, for the eye only
    jitter = rng.uniform(-0.02, 0.02, size=(len(runs), len(keys)))
    for i, r in enumerate(runs):
        y = [axes[j][0][i] + (jitter[i, j] if k in factors else 0) for j, k in enumerate(keys)]
        style = styles.get(r["arm"])
        ax.plot(
            range(len(keys)),
            y,
            color=style.colour if style else MUTED,
            linewidth=0.8,
            rasterized=len(runs) > RUNS_AS_LINES,
            alpha=max(0.12, min(0.7, 40 / len(runs))),
        )
    for j, (_, low, high) in enumerate(axes):
        ax.axvline(j, color=MUTED, linewidth=0.9)
        ax.text(j, -0.06, low, ha="center", va="top", fontsize=7, color=MUTED)
        ax.text(j, 1.05, high, ha="center", va="bottom", fontsize=7, color=MUTED)
    ax.set_xticks(
        range(len(keys)), [wrap(k.partition(".")[2].replace("_", " ") if k in factors else k, 12) for k in keys]
    )
    ax.set_yticks([])
    ax.set_ylim(-0.14, 1.14)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    view.figures.append(
        ("parallel", "Every finished run across its settings and outcomes, coloured as its arm", figure)
    )


def _levels(ax: Axes, place: int, runs: list[dict[str, Any]], key: str) -> tuple[list[float], str, str]:
    """Return places of the runs' levels from 0 to 1, and what the axis says at its ends; few levels are named on the axis."""
    texts = [r[key] for r in runs]
    names = sorted(set(texts), key=_numeric)
    at = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
    if len(names) > 6:
        return [at[t] for t in texts], names[0], names[-1]
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
    for name, y in at.items():
        ax.text(place + 0.04, y, wrap(name, 12, 1), fontsize=7, color=INK, va="center", zorder=4, bbox=box)
    return [at[t] for t in texts], "", ""


def _scale(runs: list[dict[str, Any]], key: str) -> tuple[list[float], str, str]:
    """Return places of the runs' values from 0 to 1, and the lowest and highest value as text."""
    values = np.array([np.nan if r[key] is None else r[key] for r in runs], dtype=float)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return ((values - low) / max(high - low, 1e-12)).tolist(), f"{low:.3f}", f"{high:.3f}"


def _numeric(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
