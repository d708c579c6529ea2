"""Interactions: which factors must be read together."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.config.endpoints import label_of
from ablate.report.context import Context
from ablate.report.draw import note, strip, wrap
from ablate.report.parts import View
from ablate.report.style import COLOURS, DASHES, MARKERS, new
from ablate.report.wording import no_factors, short

DARK, LIGHT = "#101014", "#fefefe"  # on a heat map's own colours, whatever the theme


def interactions(c: Context) -> View:
    """Show the strength of each pair, and the cell means behind it."""
    view = View("interactions", "Interactions", "Which choices only work together, or undo each other?")
    effects = c.findings["effects"]
    pairs = [t for t in effects["terms"] if len(t["term"]) == 2]
    if not pairs:
        view.missing = (
            no_factors(c)
            if not effects["terms"]
            else "One factor only, or a design that cannot tell its interactions apart: use `design: factorial` with two factors or more."
        )
        return view
    names = sorted({x for t in pairs for x in t["term"]}, key=lambda f: list(c.tables.study.factors).index(f))
    endpoints = list(dict.fromkeys(t["endpoint"] for t in pairs))
    across, down = names[:-1], names[1:]
    figure = new(max(5.2, 2.9 * len(endpoints) + 1.2), 0.5 * len(names) + 2.0)
    axes = np.atleast_1d(figure.subplots(1, len(endpoints)))
    for ax, endpoint in zip(axes, endpoints, strict=True):
        grid = np.full((len(down), len(across)), np.nan)
        for t in (t for t in pairs if t["endpoint"] == endpoint):
            a, b = sorted(t["term"], key=names.index)
            i, j, value = across.index(a), down.index(b), max(0.0, t["omega2"])
            grid[j, i] = value
            star = "*" if t["p_adjusted"] < 0.05 else ""
            ax.text(
                i, j, f"{value:.2f}{star}", ha="center", va="center", fontsize=8, color=DARK if value < 0.6 else LIGHT
            )
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        strip(ax)
        ax.set_xticks(range(len(across)), [short(n) for n in across], rotation=30, ha="right")
        ax.set_yticks(range(len(down)), [short(n) for n in down] if ax is axes[0] else [""] * len(down))
        ax.set_title(label_of(endpoint))
    figure.colorbar(image, ax=axes, label="partial ω²", shrink=0.8)
    view.figures.append(("interactions", "Strength of every pair (* adjusted p < .05)", figure))
    view.data["cells"] = pl.DataFrame(
        [
            {
                "endpoint": x["endpoint"],
                "factor_a": x["factors"][0],
                "factor_b": x["factors"][1],
                "level_a": x["levels"][0],
                "level_b": x["levels"][1],
                "mean": x["mean"],
                "n": x["n"],
            }
            for x in effects["cells"]
        ]
    )
    _lines(c, view, pairs)
    standing = [t for t in pairs if t["p_adjusted"] < 0.05]
    view.reading = [
        f"{' × '.join(short(x) for x in t['term'])} interact on {label_of(t['endpoint'])} (partial ω² {t['omega2']:.2f}): "
        "neither is read alone."
        for t in standing
    ] or [_none_stands(pairs)]
    if effects["left_out"]:
        view.reading.append(
            f"Interactions that these runs cannot estimate ({len(effects['left_out'])} terms) are left out."
        )
    view.widgets.append(
        (
            "interactions",
            {
                "cells": effects["cells"],
                "names": {n: short(n) for n in names},
                "endpoints": {e: label_of(e) for e in endpoints},
            },
        )
    )
    return view


def _none_stands(pairs: list[dict[str, Any]]) -> str:
    """Say that no interaction is significant, and how large the largest may be all the same."""
    t = max(pairs, key=lambda t: t["omega2"])
    low, high = t["interval"] or (None, None)
    reach = f", 95% interval {low:.2f} to {high:.2f}" if low is not None else ""
    return (
        "No interaction is significant after adjustment, so main effects are read alone. That does not show that there is "
        f"none: the largest, {' × '.join(short(x) for x in t['term'])} on {label_of(t['endpoint'])}, has partial ω² "
        f"{t['omega2']:.2f}{reach}."
    )


def _lines(c: Context, view: View, pairs: list[dict[str, Any]]) -> None:
    best = sorted(pairs, key=lambda t: (t["p_adjusted"], -t["omega2"]))[:6]
    figure = new(7.6, 2.5 * ((len(best) + 2) // 3))
    axes = np.atleast_1d(figure.subplots((len(best) + 2) // 3, min(3, len(best)), squeeze=False)).ravel()
    for ax in axes[len(best) :]:
        ax.set_visible(False)
    for ax, t in zip(axes, best, strict=False):
        cells = [
            x
            for x in c.findings["effects"]["cells"]
            if x["endpoint"] == t["endpoint"] and set(x["factors"]) == set(t["term"])
        ]
        if not cells:
            note(ax, "no cell means")
            continue
        across = list(dict.fromkeys(x["levels"][0] for x in cells))
        for k, level in enumerate(dict.fromkeys(x["levels"][1] for x in cells)):
            means = {x["levels"][0]: x["mean"] for x in cells if x["levels"][1] == level}
            ax.plot(
                [across.index(a) for a in across if a in means],
                [means[a] for a in across if a in means],
                marker=MARKERS[k % 8],
                color=COLOURS[k % 8],
                linestyle=DASHES[k % 4],
                label=wrap(level, 14, 1),
            )
        ax.set_xticks(range(len(across)), [wrap(a, 12, 1) for a in across])
        ax.set_xlim(-0.25, len(across) - 0.75)
        ax.set_xlabel(short(cells[0]["factors"][0]))
        ax.set_title(label_of(t["endpoint"]) + (" *" if t["p_adjusted"] < 0.05 else ""), fontsize=8.5)
        ax.legend(title=short(cells[0]["factors"][1]), title_fontsize=7.5, fontsize=7.5)
    view.figures.append(
        ("interaction_lines", "Cell means of the strongest pairs; parallel lines are no interaction", figure)
    )
