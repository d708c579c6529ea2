"""`ablate inspect`: a trial's trees as they were used, drawn in the terminal or as one interactive page."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np
import polars as pl
from markupsafe import Markup
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree as Drawing

from ablate.balance import metrics
from ablate.balance.usage import counts_from, nodes_from, steps_of
from ablate.config import ConfigError, reason

BAR = 12
"""Characters of a bar that means all tokens of a tree."""
MAX_STEPS = 60
"""Evaluations that a page holds at most, spread over the run, the first and the last among them."""


def load(table: Path) -> pl.DataFrame:
    """Return a trial's usage table; raises ConfigError for a file that is missing, damaged or another table."""
    try:
        frame = pl.read_parquet(table, glob=False)
        _arrays(frame)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"usage table {str(table)!r} cannot be used: {reason(error)}") from None
    return frame


def terminal(
    frame: pl.DataFrame, *, step: int | None = None, tree: int | None = None, levels: int = 4
) -> RenderableType:
    """One tree of each layer from a trial's usage table: shares, gradient skew, dead parts.

    `step` is an evaluation's (the last if not given), `tree` a tree's number (in each layer the one with the fewest
    effective leaves if not given), `levels` how far down nodes are drawn. Raises ConfigError for what the table lacks.
    """
    counts, skew, steps = _arrays(frame)
    if step is not None and step not in steps:
        raise ConfigError(f"step is {step}: the run was evaluated at {', '.join(map(str, steps))}")
    if tree is not None and not 0 <= tree < counts.shape[2]:
        raise ConfigError(f"tree is {tree}: the run's layers have trees 0 to {counts.shape[2] - 1}")
    at = len(steps) - 1 if step is None else list(steps).index(step)
    parts: list[RenderableType] = []
    for layer in range(counts.shape[1]):
        k = int(np.argmin(metrics.n_eff_frac(counts[at, layer]))) if tree is None else tree
        parts.append(
            _drawing(counts[at, layer, k], skew[at, layer, k], f"layer {layer}, tree {k}, step {steps[at]}", levels)
        )
    return Group(*parts)


def page(frame: pl.DataFrame, title: str) -> str:
    """An HTML page with pickers for layer and tree and a slider for the step; no network, any text as `title`.

    Raises ConfigError for a table without trees.
    """
    counts, skew, steps = _arrays(frame)
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_STEPS)).round().astype(int))
    data = {
        "steps": steps[chosen].tolist(),
        "counts": counts[chosen].tolist(),
        "skew": [[[[_short(v) for v in t] for t in layer] for layer in at] for at in skew[chosen]],
        "n_eff_frac": np.round(metrics.n_eff_frac(counts[chosen]), 4).tolist(),
        "dead_frac": np.round(metrics.dead_frac(counts[chosen]), 4).tolist(),
        "max_vio": np.round(metrics.max_vio(counts[chosen]), 3).tolist(),
    }
    folder = files("ablate.balance") / "page"
    css, script, template = ((folder / f"inspect.{kind}").read_text("utf-8") for kind in ("css", "js", "html"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    )
    # "<" inside JSON strings would let a text close the element it is in; here all are numbers, and it stays so.
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    safe = {"css": css, "script": script, "payload": payload}
    marked = {name: Markup(text) for name, text in safe.items()}  # ours, not a user's
    return environment.from_string(template).render(title=title, policy=policy, **marked)


def _arrays(frame: pl.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    if frame.filter(pl.col("window") == "held_out").is_empty():
        raise ConfigError("the run has no usage table: its model has no tree layers, or it was never evaluated")
    return counts_from(frame), nodes_from(frame, "skew"), steps_of(frame)


def _short(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 3)


def _drawing(counts: NDArray[np.int64], skew: NDArray[np.float64], title: str, levels: int) -> Drawing:
    by_level = metrics.node_counts(counts)
    depth, total = len(by_level) - 1, int(by_level[0][0])
    gone = metrics.dead(counts)
    head = Text.assemble(
        (title, "bold"),
        f"  effective leaves {float(metrics.n_eff_frac(counts)) * len(counts):.1f} of {len(counts)}"
        f", dead {gone.mean():.0%}, max load {float(metrics.max_vio(counts)) + 1:.1f}x the mean",
    )
    drawing = Drawing(head, guide_style="dim")

    def add(parent: Drawing, level: int, index: int) -> None:
        count = int(by_level[level][index])
        under = slice(index << (depth - level), (index + 1) << (depth - level))
        label = _share(count, total)
        if level < depth:
            value = skew[(1 << level) - 1 + index]
            label += Text("  skew  –  " if np.isnan(value) else f"  skew {value:+.2f}", _skew_style(float(value)))
        else:
            label += Text(f"  leaf {index}", "dim")
        inner = level < depth and count > 0
        if inner and (level >= levels or gone[under].all()):
            leaves = counts[under]
            alive = int((~gone[under]).sum())
            label += Text(f"  {len(leaves)} leaves below, {alive} alive", "dim" if alive else "red dim")
        elif level == depth and gone[index]:
            label += Text(" dead", "red")
        elif level < depth and count == 0:
            label += Text(f"  {1 << (depth - level)} leaves below, never reached", "red dim")
        node = parent.add(label)
        if inner and level < levels and not gone[under].all():
            add(node, level + 1, 2 * index)
            add(node, level + 1, 2 * index + 1)

    add(drawing, 0, 0)
    return drawing


def _share(count: int, total: int) -> Text:
    share = count / total if total else 0.0
    eighths = round(share * BAR * 8)
    bar = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
    return Text.assemble((bar.ljust(BAR), "cyan"), f" {100 * share:5.1f}%")


def _skew_style(value: float) -> str:
    if np.isnan(value):
        return "dim"
    return "dark_orange" if value > 0.1 else "blue" if value < -0.1 else "default"


def labels(drawing: Drawing) -> Iterator[str]:
    """The text of a drawing's lines, top down."""
    yield str(drawing.label)
    for child in drawing.children:
        yield from labels(child)
