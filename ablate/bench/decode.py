"""`ablate bench decode`: generation one token at a time, trees against dense layers of as many units, in one run."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ablate.config import PRESETS, Trial
from ablate.model.counts import count
from ablate.model.transformer import Block, Transformer

CONTENDERS = ("tree", "dense_total", "dense_active", "none")
"""`dense_total` has as many units as the tree has in all, `dense_active` as many as a token activates, `none` none."""
VOCABULARY = 2048
WARM_UP = 8
BLOCK = 8
"""Tokens that a contender writes before the next one's turn."""


def run(
    presets: Sequence[str], *, threads: int | None = None, tokens: int = 64, as_json: bool = False
) -> list[dict[str, Any]]:
    """Median seconds a token behind a key-value cache: the whole model, and its feed-forward layers alone.

    Contenders take turns. Rows: preset, contender, threads, units and active units a layer, parameters, active_params,
    seconds (median of a token), tokens_per_second, feedforward_seconds (of all blocks), tree_speedup (of the tree over
    this contender), feedforward_speedup, tokens. Weights are random: time depends on them only through which paths
    tokens take, and those differ from token to token as they do after training.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for preset in presets:
        of_preset = _measure(preset, tokens)
        rows += of_preset
        if as_json:
            for row in of_preset:
                print(json.dumps(row), flush=True)
    if not as_json:
        _print(rows)
    return rows


def _measure(preset: str, tokens: int) -> list[dict[str, Any]]:
    trials = {name: _trial(preset, name) for name in CONTENDERS}
    writers = {name: _writer(trial, tokens + WARM_UP) for name, trial in trials.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    for _ in range(WARM_UP):
        for step in writers.values():
            step()
    for _ in range(-(-tokens // BLOCK)):
        for name, step in writers.items():
            times[name] += [step() for _ in range(BLOCK)]
    medians = {n: tuple(statistics.median(column) for column in zip(*t, strict=True)) for n, t in times.items()}
    rows = []
    for name, trial in trials.items():
        cost = count(trial, VOCABULARY)
        seconds, feedforward = medians[name]
        rows.append(
            {
                "preset": preset,
                "contender": name,
                "threads": torch.get_num_threads(),
                "total_units": cost.total_units,
                "active_units": cost.active_units,
                "total_params": cost.total_params,
                "active_params": cost.active_params,
                "seconds": seconds,
                "tokens_per_second": 1 / seconds,
                "feedforward_seconds": feedforward,
                "tree_speedup": seconds / medians["tree"][0],
                "feedforward_speedup": feedforward / medians["tree"][1],
                "tokens": len(times[name]),
            }
        )
    return rows


def _trial(preset: str, contender: str) -> Trial:
    base = PRESETS[preset]
    trial = Trial.model_validate({**base, "train": {}})
    if contender == "tree":
        return trial
    model = {**base["model"], "feedforward": "none" if contender == "none" else "dense"}
    width = trial.tree.total_units if contender == "dense_total" else trial.tree.active_units
    return Trial.model_validate({**base, "train": {}, "model": model, "dense": {"width": width}})


def _writer(trial: Trial, tokens: int) -> Callable[[], tuple[float, float]]:
    """Writes one token and returns its seconds, and those of the feed-forward layers on that token's activations."""
    model = Transformer(trial, VOCABULARY).eval()
    start = min(trial.model.context // 2, trial.model.context - tokens - BLOCK)
    ids = torch.randint(0, VOCABULARY, (1, trial.model.context), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = model.cache(1)
        model.features(ids[:, :start], cache)
    blocks = [m for m in model.blocks if isinstance(m, Block)]
    layers = [s or b.feedforward for b, s in zip(blocks, cache.steps, strict=True) if b.feedforward is not None]
    generator = torch.Generator().manual_seed(1)

    @torch.inference_mode()
    def step() -> tuple[float, float]:
        token = ids[:, cache.lengths[0] : cache.lengths[0] + 1]
        began = time.perf_counter()
        model(token, cache)
        whole = time.perf_counter() - began
        inputs = [torch.randn(1, 1, trial.model.d_model, generator=generator) for _ in layers]
        began = time.perf_counter()
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
        return whole, time.perf_counter() - began

    return step


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"One token at a time, {rows[0]['threads']} threads, median of {rows[0]['tokens']} tokens")
    for column in ("preset", "contender", "units", "active", "tokens/s", "tree faster", "layers µs", "tree faster"):
        table.add_column(column, justify="left" if column in {"preset", "contender"} else "right")
    for r in rows:
        none = r["contender"] == "none"
        table.add_row(
            r["preset"],
            r["contender"],
            str(r["total_units"]),
            str(r["active_units"]),
            f"{r['tokens_per_second']:.0f}",
            f"{r['tree_speedup']:.2f}×",
            "" if none else f"{r['feedforward_seconds'] * 1e6:.0f}",
            "" if none else f"{r['feedforward_speedup']:.2f}×",
        )
    Console(file=sys.stdout).print(table)
