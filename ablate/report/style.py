"""One colour-blind-safe look for everything that is drawn (Okabe & Ito 2008; colour is never the only mark)."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import polars as pl
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from ablate.analysis.arms import level_text
from ablate.analysis.frames import Tables
from ablate.results.columns import FACTOR

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#7a6a00"]
INK, MUTED, GRID, PAPER = "#1c1d21", "#5b5f68", "#dcdee3", "#fffffe"
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
PLOTLY_MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"]
DASHES: list[Any] = ["-", "--", ":", "-."]
PLOTLY_DASHES = ["solid", "dash", "dot", "dashdot"]
# Share of tokens against an even share, on a log scale: blue under, white even, brown over.
LOAD = LinearSegmentedColormap.from_list("load", ["#08306b", "#4292c6", "#f7f7f5", "#e08214", "#7f3b08"])
SIGNED = LinearSegmentedColormap.from_list("signed", ["#0072b2", "#f7f7f5", "#d55e00"])
DEAD = "#101014"

VERDICT_COLOUR = {"supported": "#009e73", "refuted": "#d55e00", "inconclusive": MUTED}
VERDICT_MARK = {"supported": "o", "refuted": "X", "inconclusive": "D"}

VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
VARIABLES |= {colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)}
"""Palette colours as the page's CSS variables, which have values for light and dark."""

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "figure.dpi": 100,
    "svg.hashsalt": "ablate",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from study files; a dollar sign is not mathematics
}


NARROW = 4.9
"""Inches of a figure that a phone shows whole, with text that can be read."""
RUNS_AS_LINES = 300
"""Runs that a figure draws as vectors; the lines or dots of more are a picture inside it, so that a page stays small."""


def new(width: float, height: float) -> Figure:
    """Return an empty figure (inches) with constrained layout; draw inside `mpl.rc_context(RC)`."""
    return Figure(figsize=(width, height), layout="constrained")


def lay_out(figure: Figure) -> None:
    """Place everything once: otherwise each saved format repeats the layout, which takes longer than drawing."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def svg(figure: Figure) -> str:
    """Return SVG text without date or creator, the same for the same figure; `dpi` is that of its pictures of many lines."""
    buffer = io.StringIO()
    with mpl.rc_context(RC):
        figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def png(figure: Figure) -> bytes:
    """Return a PNG at 160 dots an inch without software metadata, and without an alpha channel: its paper is opaque."""
    drawn, kept = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(drawn, format="png", dpi=160, metadata={"Software": None})
    with Image.open(drawn) as picture:
        picture.convert("RGB").save(kept, "png", optimize=True, dpi=(160, 160))
    return kept.getvalue()


def inline(text: str, prefix: str, label: str) -> str:
    """Return SVG text for use inside a page: own ids, theme colours as CSS variables, an accessible name.

    `label` must already be escaped for HTML.
    """
    body = text[text.index("<svg") :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{prefix}-\2"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', _opening, body, count=1)
    return body.replace('role="img">', f'role="img" aria-label="{label}">', 1).strip()


def _opening(found: re.Match[str]) -> str:
    """An inline picture's first tag: letters have one size in all pictures, and a narrow one fits a phone."""
    width = float(found[1].split()[2])
    kind = ' class="fits"' if width <= 72 * NARROW + 1 else ""
    return (
        f'<svg{kind} viewBox="{found[1]}" style="max-width:{1.7 * width:.0f}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" role="img">'
    )


@dataclass(frozen=True)
class ArmStyle:
    """How one arm is drawn, the same in every figure."""

    colour: str
    marker: int
    filled: bool
    dash: int = 0


@dataclass(frozen=True)
class Styles:
    """Styles of all arms, and the legend that explains them."""

    arms: dict[str, ArmStyle]
    legend: list[tuple[str, ArmStyle]]


def assign(tables: Tables, order: list[str], labels: dict[str, str]) -> Styles:
    """Return the mark of each arm: colour by the first factor, marker by the second, fill by the third.

    Named arms and controls get marks of their own.
    """
    factors = tables.factors
    first = tables.trials.filter(pl.col("kind") != "tune").unique("arm", keep="first", maintain_order=True)
    rows = {r["arm"]: r for r in first.iter_rows(named=True)}
    spanned = {"arm", "search"}  # kinds whose settings are levels of the factors
    grid = [a for a in order if rows[a]["kind"] in spanned and a not in tables.study.arms and a != "reference"]
    # Few levels make a readable composite legend; a continuous or crowded factor does not.
    ranked = sorted(factors, key=lambda f: -_levels(tables, f, grid))
    usable = [f for f in ranked if 2 <= _levels(tables, f, grid) <= (8, 8, 2)[min(ranked.index(f), 2)]][:3]
    arms: dict[str, ArmStyle] = {}
    legend: list[tuple[str, ArmStyle]] = []
    plain = len(grid) <= 8 and (len(usable) < 2 or not usable)
    if grid and not plain and usable:
        levels = [_ordered(tables, f, grid) for f in usable]
        for a in grid:
            place = [levels[i].index(level_text(rows[a][FACTOR + f])) for i, f in enumerate(usable)] + [0, 0]
            arms[a] = ArmStyle(COLOURS[place[0] % 8], place[1] % 8, place[2] == 0, place[1] % 4)
        for i, f in enumerate(usable):
            for j, level in enumerate(levels[i]):
                name = f"{f.partition('.')[2].replace('_', ' ')} {level}"
                mark = (
                    ArmStyle(COLOURS[j % 8], 0, True),
                    ArmStyle(MUTED, j % 8, True, j % 4),
                    ArmStyle(MUTED, 0, j == 0),
                )[i]
                legend.append((name, mark))
    else:
        for i, a in enumerate(grid):
            arms[a] = ArmStyle(COLOURS[i % 8], i % 8, True, i // 8 % 4)
            if len(grid) <= 12:
                legend.append((labels[a], arms[a]))
    named = [a for a in order if a not in arms and rows[a]["kind"] != "control"]
    for i, a in enumerate(named):
        # Marks from the far end, so that they differ from the grid's. After eight: other marks in the same colours, hollow.
        turn = i // 8
        arms[a] = ArmStyle(INK if i == 0 else COLOURS[(7 - i) % 8], (7 - i + 3 * turn) % 8, turn % 2 == 0, turn % 4)
        legend.append((labels[a], arms[a]))
    for i, a in enumerate(a for a in order if rows[a]["kind"] == "control"):
        arms[a] = ArmStyle(INK if i < 6 else MUTED, (5, 6, 7)[i % 3], i % 6 < 3, 1 + i % 3)
        legend.append((labels[a], arms[a]))
    return Styles(arms, legend)


def assign_leading(leading: list[str], order: list[str]) -> Styles:
    """Colours for the best candidates of a search, grey for all others."""
    own = {a: ArmStyle(COLOURS[i % 8], i % 8, True) for i, a in enumerate(leading)}
    return Styles({a: own.get(a, ArmStyle(MUTED, 0, False)) for a in order}, list(own.items()))


def _levels(tables: Tables, factor: str, grid: list[str]) -> int:
    return len(_ordered(tables, factor, grid))


def _ordered(tables: Tables, factor: str, grid: list[str]) -> list[str]:
    seen = tables.trials.filter(pl.col("arm").is_in(grid))[FACTOR + factor].unique().to_list()
    spec = tables.study.factors.get(factor)
    wanted = [level_text(v) for v in (spec.levels or [])] if spec else []
    texts = sorted({level_text(v) for v in seen})
    return [w for w in wanted if w in texts] + [t for t in texts if t not in wanted]
