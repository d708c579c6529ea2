"""Previews of a trial for MLflow's artifact page, which shows PNG and HTML but no parquet."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from ablate.config.endpoints import ENDPOINTS, label_of

History = Mapping[int, Mapping[str, float]]
SHARES = ("n_eff_frac", "dead_frac")


def previews(history: History, folder: Path) -> list[Path]:
    """Write evaluations.png and evaluations.html: a trial's curves, and every value of every evaluation; their paths."""
    steps = sorted(history)
    return [_picture(history, steps, folder), _table(history, steps, folder)]


def _picture(history: History, steps: list[int], folder: Path) -> Path:
    from matplotlib.figure import Figure  # slow to import, and needed only at a trial's end

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    quality, shares = figure.subplots(1, 2)
    for axis, keys in ((quality, [k for k in ENDPOINTS if k not in (*SHARES, "bits_lost")]), (shares, SHARES)):
        for key in keys:
            points = [(s, history[s][key]) for s in steps if key in history[s]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label_of(key))
        axis.set_xlabel("optimizer step")
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False)
    shares.set_ylim(-0.03, 1.03)
    path = folder / "evaluations.png"
    figure.savefig(path, dpi=110)
    return path


def _table(history: History, steps: list[int], folder: Path) -> Path:
    """All metrics as rows, those of single layers last; evaluations as columns."""
    names = sorted({k for values in history.values() for k in values}, key=lambda k: ("/" in k, k))
    head = "".join(f"<th>step {s}</th>" for s in steps)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{history[s][name]:.5g}</td>" if name in history[s] else "<td></td>" for s in steps)
        + "</tr>"
        for name in names
    )
    style = "body{font:14px sans-serif}th{text-align:left}td{text-align:right}td,th{padding:2px 8px}"
    path = folder / "evaluations.html"
    text = f"<!doctype html><meta charset=utf-8><style>{style}</style><table><tr><th></th>{head}</tr>{rows}</table>\n"
    path.write_text(text, encoding="utf-8")
    return path
