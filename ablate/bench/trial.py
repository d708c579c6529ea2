"""`ablate bench trial`: whole training steps side by side in one run: trees, dense, and trees computed densely and masked."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from ablate.balance.probe import Probe
from ablate.config import PRESETS, Trial
from ablate.model.transformer import Transformer
from ablate.training.optimizer import TreeAdamW

CONTENDERS: dict[str, dict[str, dict[str, Any]]] = {
    "tree": {},
    "dense_4d": {"model": {"feedforward": "dense"}},
    "masked": {"train": {"backend": "reference"}},
    "tree_probed": {},
}
"""`tree_probed` is the tree with the leaves of every training step counted."""
BATCH = {"nano": 8, "small": 4}
VOCABULARY = 2048


def run(
    presets: Sequence[str], *, threads: int | None = None, steps: int = 10, as_json: bool = False
) -> list[dict[str, Any]]:
    """Median seconds and tokens/s of `steps` optimizer steps of each contender, taken in turn after two warm-up rounds.

    Rows: preset, contender, threads, tokens, seconds (median of a step), tokens_per_second, tree_speedup (of `tree` over
    it), probe_share (of the step, spent counting; timed inside it, so that the noise between steps does not matter), runs.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for preset in presets:
        trials = {name: _trial(preset, changes) for name, changes in CONTENDERS.items()}
        calls = {name: _step(trial, BATCH[preset], probed=name == "tree_probed") for name, trial in trials.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        shares: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(steps + 2):
            for name, call in calls.items():
                started = time.perf_counter()
                counting = call()
                if turn >= 2:
                    times[name].append(time.perf_counter() - started)
                    shares[name].append(counting / times[name][-1])
        tokens = BATCH[preset] * trials["tree"].model.context
        fastest = statistics.median(times["tree"])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            row = {
                "preset": preset,
                "contender": name,
                "threads": torch.get_num_threads(),
                "tokens": tokens,
                "seconds": median,
                "tokens_per_second": tokens / median,
                "tree_speedup": median / fastest,
                "probe_share": statistics.median(shares[name]),
                "runs": len(seconds),
            }
            rows.append(row)
            if as_json:
                print(json.dumps(row), flush=True)
    if not as_json:
        _print(rows)
    return rows


def _trial(preset: str, changes: dict[str, dict[str, Any]]) -> Trial:
    base = PRESETS[preset]
    merged = {k: {**base.get(k, {}), **changes.get(k, {})} for k in {*base, *changes}}
    train = merged.setdefault("train", {})
    train.update(batch_size=BATCH[preset], accumulate=1)
    return Trial.model_validate(merged)


def _step(trial: Trial, batch: int, *, probed: bool) -> Callable[[], float]:
    """One optimizer step on fixed random tokens; returns the seconds that counting leaves took of it."""
    model = Transformer(trial, VOCABULARY)
    optimizer = TreeAdamW(model, trial.train)
    ids = torch.randint(0, VOCABULARY, (batch, trial.model.context + 1), generator=torch.Generator().manual_seed(0))
    probe = Probe()
    if probed:
        probe.attach(model)

    def step() -> float:
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trial.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        for tree in model.trees():
            tree.finish_step()
        started = time.perf_counter()
        probe.watch_training()
        return time.perf_counter() - started

    return step


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Whole training steps, {rows[0]['threads']} threads, median of {rows[0]['runs']}")
    for column in ("preset", "contender", "ms a step", "tokens/s", "tree is faster by", "counting leaves"):
        table.add_column(column, justify="left" if column in {"preset", "contender"} else "right")
    for r in rows:
        table.add_row(
            r["preset"],
            r["contender"],
            f"{r['seconds'] * 1e3:.1f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['tree_speedup']:.2f}×",
            f"{r['probe_share']:.1%}",
        )
    Console(file=sys.stdout).print(table)
