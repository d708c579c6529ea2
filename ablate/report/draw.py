"""Small drawing helpers shared by the figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from ablate.report.style import DASHES, INK, MARKERS, MUTED, PLOTLY_MARKERS, ArmStyle, Styles, lay_out, new


def panels(
    count: int, *, width: float = 2.35, height: float = 1.75, across: int = 4, share: Any = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a grid of `count` small multiples with shared axes."""
    columns = min(across, max(1, count))
    rows = math.ceil(count / columns)
    figure = new(max(width * columns, 4.6) + 0.4, height * rows + 0.55)
    axes = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    for i, ax in enumerate(axes[:count]):
        # With a spare panel below, this one carries the axis.
        if i + columns >= count:
            ax.tick_params(labelbottom=True)
    return figure, axes[:count]


def wrap(text: str, width: int = 26, lines: int = 2) -> str:
    """Return text cut to a few short lines, for panel titles, ticks and legends."""
    if text.startswith("_"):  # Matplotlib leaves such a name out of legends
        text = "\N{THIN SPACE}" + text
    parts = textwrap.wrap(text, width) or [""]
    return "\n".join(parts[:lines]) + ("…" if len(parts) > lines else "")


def mark(style: ArmStyle) -> dict[str, Any]:
    """Return an arm's marker settings for `Axes.plot`."""
    return {
        "marker": MARKERS[style.marker],
        "color": style.colour,
        "markerfacecolor": style.colour if style.filled else "none",
        "markeredgecolor": style.colour,
    }


def plotly_mark(style: ArmStyle, size: int = 9) -> dict[str, Any]:
    """Return an arm's marker settings for plotly."""
    name = PLOTLY_MARKERS[style.marker] + ("" if style.filled else "-open")
    return {"symbol": name, "color": style.colour, "size": size, "line": {"width": 1.2 if not style.filled else 0}}


def legend(figure: Figure, styles: Styles, *, lines: bool = False, columns: int = 4, controls: bool = True) -> None:
    """Draw the arms' marks under the figure; without the controls where they are not drawn as marks."""
    dense = [] if controls else [s for arm, s in styles.arms.items() if arm == "moe" or arm.startswith("dense_")]
    handles = []
    for name, style in (entry for entry in styles.legend if entry[1] not in dense):
        dash: Any = DASHES[style.dash] if lines else "none"
        handles.append(Line2D([], [], label=wrap(name, 34, 2), markersize=6, linestyle=dash, **mark(style)))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def ellipse(x: Sequence[float], y: Sequence[float], points: int = 60) -> tuple[Any, Any] | None:
    """Return the 95% confidence ellipse of a mean of paired seeds (Hotelling's T²).

    None under five seeds, or where the ellipse has no area.
    """
    from scipy import stats

    n = len(x)
    if n < 5:  # at three it is wider than the figure
        return None
    cov = np.cov(np.array([x, y]))
    values, vectors = np.linalg.eigh(cov)
    if values.min() <= 0:
        return None
    radius = np.sqrt(2 * (n - 1) / (n * (n - 2)) * stats.f.ppf(0.95, 2, n - 2) * values)
    angle = np.linspace(0, 2 * np.pi, points)
    circle = vectors @ (radius[:, None] * np.array([np.cos(angle), np.sin(angle)]))
    return np.mean(x) + circle[0], np.mean(y) + circle[1]


def poor_end(values: Any, sign: float) -> float:
    """Return where an axis of quality ends on its poor side, four usual spreads away; `sign` is 1 where less is better."""
    q1, q3 = np.quantile(sign * np.asarray(values), [0.25, 0.75])
    return float(sign * (q3 + 4 * max(q3 - q1, 1e-3)))


def cut_poor_end(ax: Axes, values: Any, sign: float) -> None:
    """End an axis of quality at `poor_end` where values lie beyond it: one poor run must not flatten the others."""
    limit = poor_end(values, sign)
    if (sign * np.asarray(values)).max() > sign * limit:
        ax.set_ylim(top=limit) if sign > 0 else ax.set_ylim(bottom=limit)


def few_ticks(*axes: Axes, count: int = 5) -> None:
    """Allow at most `count` ticks on the x axis, so that labels never touch."""
    for ax in axes:
        ax.locator_params(axis="x", nbins=count)


def versus(name: str, other: str, width: int = 60) -> str:
    """Return a comparison's tick label: broken before the second name where it is long."""
    one = f"{name}  vs  {other}"
    return one if len(one) <= width else f"{wrap(name, width, 1)}\nvs {wrap(other, width, 1)}"


def rows_above(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows of a forest plot inside the axis, each above its mark: a narrow window has no room beside it."""
    for i, name in enumerate(names):
        text = name.replace("\n", " ")
        ax.text(
            0.01, i + 0.24, wrap(text, 64, 1), transform=ax.get_yaxis_transform(), color=MUTED, fontsize=8, va="bottom"
        )
    ax.set_yticks([])
    ax.set_ylim(-0.6, len(names) - 0.1)


PLACES = ((6, 4, "left"), (-6, 4, "right"), (6, -11, "left"), (-6, -11, "right"), (0, 9, "center"), (0, -17, "center"))
"""Where a name may be beside its mark (points to the right, points up, alignment), best first."""
MARK_POINTS = 5.0
"""Half the width of a mark that no name may cover."""


def name_marks(figure: Figure, ax: Axes, names: Sequence[tuple[str, float, float]]) -> list[str]:
    """Write a name beside each mark (name, x, y), where there is room, and return those written; the first come first.

    Lays the figure out, so it is called when all else is drawn.
    """
    lay_out(figure)
    point = figure.dpi / 72
    taken = []
    for _, x, y in names:
        across, up = ax.transData.transform((x, y))
        half = MARK_POINTS * point
        taken.append(Bbox.from_extents(across - half, up - half, across + half, up + half))
    written = []
    for name, x, y in names:
        for across, up, align in PLACES:
            text = ax.annotate(
                name, (x, y), xytext=(across, up), textcoords="offset points", fontsize=8, color=INK, ha=align
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) and ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1:
                taken.append(box)
                written.append(name)
                break
            text.remove()
    return written


def note(ax: Axes, text: str) -> None:
    """Write a muted remark inside an axis."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=MUTED, fontsize=8)


def zero(ax: Axes, *, vertical: bool = True) -> None:
    """Draw a line at zero."""
    (ax.axvline if vertical else ax.axhline)(0, color=MUTED, linewidth=0.9, zorder=1)


def strip(ax: Axes) -> None:
    """Remove grid and frame, for heat maps and drawings."""
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0, colors=MUTED)


def plain(text: str) -> str:
    """Return a name without the tags and %{…} that plotly would interpret in labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")
