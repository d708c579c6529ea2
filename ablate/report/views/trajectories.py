"""Effective and dead leaves over training, every seed a line."""

from __future__ import annotations

from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from ablate.config.endpoints import RESTORED
from ablate.report.context import Context
from ablate.report.draw import panels, wrap
from ablate.report.parts import View
from ablate.report.style import MUTED, RUNS_AS_LINES
from ablate.report.tables import needs


def trajectories(c: Context) -> View:
    """Show n_eff_frac and dead leaves over training, every seed a line."""
    view = View(
        "trajectories",
        "Dead leaves and effective leaves over training",
        "Do trees recover, or prune themselves for good?",
    )
    view.missing = needs(c, "history")
    if view.missing:
        return view
    history = c.history.filter(pl.col("arm").is_in(c.shown) & pl.col("n_eff_frac").is_not_null())
    view.data["trajectories"] = history.select("arm", "seed", "trial", "step", "n_eff_frac", "dead_frac", "bits_lost")
    view.reading = [c.choice] if c.choice else []
    figure, axes = panels(len(c.shown))
    many = history["trial"].n_unique() > RUNS_AS_LINES
    for i, (ax, arm) in enumerate(zip(axes, c.shown, strict=True)):
        runs = history.filter(pl.col("arm") == arm).partition_by("trial", maintain_order=True)
        for name, colour, style in (("n_eff_frac", "#0072b2", "-"), ("dead_frac", "#d55e00", "--")):
            look: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.3}
            if many:
                _together(ax, [part.select("step", name).to_numpy() for part in runs], **look)
            for part in [] if many else runs:
                ax.plot(part["step"], part[name], **look)
        ax.axhline(RESTORED, color=MUTED, linewidth=0.8, linestyle=":")
        ax.set_title(wrap(c.labels[arm], 32))
        ax.set_ylim(-0.03, 1.03)
        if i == 0:
            figure.legend(
                [Line2D([], [], color="#0072b2"), Line2D([], [], color="#d55e00", linestyle="--")],
                ["n_eff_frac (effective leaves / L)", "dead_frac (share of leaves)"],
                loc="outside upper center",
                ncols=2,
            )
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("share of leaves", fontsize=9)
    view.figures.append(
        (
            "trajectories",
            f"Effective leaves (solid) and dead leaves (dashed) over training; every line is a seed, dotted: {RESTORED:g}",
            figure,
        )
    )
    return view


def _together(ax: Axes, lines: list[Any], **look: Any) -> None:
    """Draw many lines [points, 2] as one picture: thousands of their own would take longer than all else."""
    ax.add_collection(LineCollection(lines, rasterized=True, alpha=0.3, **look))
    ax.autoscale_view()
