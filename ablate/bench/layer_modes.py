"""Further measurements of the CPU layer: growth with depth (time and memory), and threads."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ablate.bench.contenders import SHAPES, Shape
from ablate.kernels.op import tree_feedforward
from ablate.training.lifeline import die_with, out_of_reach

RUNS = 15
BLOCK = 5


def growth(
    depths: Sequence[int] = (6, 8, 10, 12), *, threads: int | None = None, as_json: bool = False
) -> list[dict[str, Any]]:
    """How forward and backward grow with depth at N 16384, d 256, one tree, W 1.

    Rows: depth, units, threads, seconds (median), runs, peak_bytes (of one training step, beyond the parameters and one
    set of gradients; None where /proc does not tell), seconds_ratio and peak_ratio (to the first depth).
    """
    if threads is not None:
        torch.set_num_threads(threads)
    shapes = [Shape(name=f"D {d}", tokens=16384, d=256, trees=1, depth=d, leaf_width=1) for d in depths]
    times = _in_turn({s.depth: _step(s) for s in shapes})
    with out_of_reach():
        started = multiprocessing.get_context("spawn").Pool(1, die_with, (os.getpid(),), maxtasksperchild=1)
    with started as pool:
        peaks = [pool.apply(_peak_bytes, (s, torch.get_num_threads())) for s in shapes]
    rows: list[dict[str, Any]] = [
        {
            "depth": s.depth,
            "units": s.total_units,
            "threads": torch.get_num_threads(),
            "seconds": statistics.median(times[s.depth]),
            "runs": len(times[s.depth]),
            "peak_bytes": peak,
        }
        for s, peak in zip(shapes, peaks, strict=True)
    ]
    for row in rows:
        row["seconds_ratio"] = row["seconds"] / rows[0]["seconds"]
        row["peak_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"] if row["peak_bytes"] else None
    return _show("Growth with depth: 16384 tokens, d 256, one tree, leaf width 1", rows, as_json)


def scaling(shapes: Sequence[str] = ("A",), *, as_json: bool = False) -> list[dict[str, Any]]:
    """Forward and backward with 1, 2, 4, ... threads up to the machine's, in turn by blocks of BLOCK steps.

    Training never changes its threads from step to step; the first step after a change, with other caches, is not counted.
    Rows: shape, threads, seconds (median), runs, speedup (over one thread).
    """
    most = torch.get_num_threads()
    counts = sorted({*(1 << i for i in range(most.bit_length())), most})
    rows: list[dict[str, Any]] = []
    for name in shapes:
        step = _step(SHAPES[name])

        def on(threads: int, step: Callable[[], object] = step) -> Callable[[], object]:
            def call() -> object:
                torch.set_num_threads(threads)
                return step()

            return call

        times = _in_turn({n: on(n) for n in counts}, block=BLOCK)
        for n in counts:
            seconds = statistics.median(times[n])
            row = {"shape": name, "threads": n, "seconds": seconds, "runs": len(times[n])}
            rows.append(row | {"speedup": statistics.median(times[1]) / seconds})
    torch.set_num_threads(most)
    return _show("Threads", rows, as_json)


def _step(shape: Shape) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward; gradients are freed after each, so their memory is used again."""
    g = torch.Generator().manual_seed(0)
    spec, d = shape.spec, shape.d
    x = torch.randn(shape.tokens, d, generator=g).requires_grad_()
    w_in, w_out = ((torch.randn(spec.trees, spec.in_rows, d, generator=g) * d**-0.5).requires_grad_() for _ in range(2))
    b = torch.zeros(spec.trees, spec.in_rows, requires_grad=True)
    gy = torch.randn(shape.tokens, d, generator=g)
    return lambda: torch.autograd.grad(tree_feedforward(x, w_in, b, w_out, spec).y, (x, w_in, b, w_out), gy)


def _in_turn(calls: dict[Any, Callable[[], object]], block: int = 1) -> dict[Any, list[float]]:
    """Seconds of RUNS turns of every call after two warm ones; of a turn of several calls the first does not count."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for turn in range(RUNS + 2):
        for key, call in calls.items():
            for place in range(block):
                started = time.perf_counter()
                call()
                if turn >= 2 and (place > 0 or block == 1):
                    times[key].append(time.perf_counter() - started)
    return times


def _peak_bytes(shape: Shape, threads: int) -> int | None:
    """Peak resident memory of one step in a process of its own, above inputs, parameters and one set of gradients."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    torch.set_num_threads(threads)
    _step(Shape(name="", tokens=64, d=shape.d, trees=1, depth=2, leaf_width=1))()  # compiles, and loads what it needs
    step = _step(shape)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _kilobytes(status, "VmRSS")
    grads = step()
    peak = _kilobytes(status, "VmHWM")
    return (peak - before) * 1024 - sum(t.nbytes for t in grads[1:])


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def _show(title: str, rows: list[dict[str, Any]], as_json: bool) -> list[dict[str, Any]]:
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return rows
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(file=sys.stdout, width=120).print(table)
    return rows
