"""`ablate bench layer`: the tree layer beside dense, masked and mixture layers in one run, for ratios one can trust."""

from __future__ import annotations

import json
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

from ablate.bench.contenders import Contender, Shape, assert_correct, build, tokens

SHAPES = {
    s.name: s
    for s in (
        Shape(name="A", tokens=4096, d=256, trees=4, depth=8, leaf_width=4),
        Shape(name="B", tokens=16384, d=768, trees=1, depth=11, leaf_width=1),
        Shape(name="C", tokens=4096, d=256, trees=8, depth=6, leaf_width=8),
    )
}
"""A and C are training shapes; B is UltraFastBERT's benchmark: 12 levels of units, 4095 in all."""
PASSES = ("forward", "forward_backward")
ROUTINGS = ("iid", "skewed")
RUNS, MIN_RUNS = 15, 3
BUDGET_SECONDS = 3.0
"""A contender that has used this much time and has `MIN_RUNS` runs is not run again."""

Timed = tuple[Callable[[], object], float]

# Peak flops with matrix units (bf16; fp32 without TF32) and bytes per second, from the makers' data sheets.
PEAKS = {
    "H100": (989e12, 67e12, 3.35e12),
    "H200": (989e12, 67e12, 4.8e12),
    "A100": (312e12, 19.5e12, 2.0e12),
    "MI300X": (1307e12, 163e12, 5.3e12),
}


def run(
    shapes: Sequence[str] = ("A", "B", "C"),
    device: str = "cpu",
    *,
    threads: int | None = None,
    as_json: bool = False,
    passes: Sequence[str] = PASSES,
    routings: Sequence[str] = ROUTINGS,
    plot: Path | None = None,
) -> list[dict[str, Any]]:
    """Median seconds of every contender at named shapes, taken in turn within one run; correctness is asserted first.

    Rows: shape, pass, contender, threads, routing, seconds (median), runs; printed as JSON lines or as tables, and
    drawn to `plot` if given. Where a cost is linear in tokens and minutes long, a share of them is timed. On
    `cuda` numbers are bfloat16, times are between CUDA events, and rows also have device, dtype, tflops and gbytes (per
    second, useful work only) and roofline (fraction of the bound, None where the device's peaks are not known). Raises
    KeyError for an unknown shape and AssertionError on a wrong result.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows: list[dict[str, Any]] = []
    for name in shapes:
        shape = SHAPES[name]
        contenders = build(shape, device, dtype)
        for routing in routings:
            x = tokens(shape, routing, device, dtype)
            assert_correct(shape, contenders, x)
            for pass_ in passes:
                calls = _calls(contenders, x, pass_)
                times = _in_turn(calls) if device == "cpu" else _on_gpu(calls)
                for contender, seconds in times.items():
                    row: dict[str, Any] = {
                        "shape": name,
                        "pass": pass_,
                        "contender": contender,
                        "threads": torch.get_num_threads(),
                        "routing": routing,
                        "seconds": statistics.median(seconds),
                        "runs": len(seconds),
                    }
                    if device != "cpu":
                        row |= _rates(shape, contenders[contender], pass_, row["seconds"], dtype)
                    rows.append(row)
                    if as_json:
                        print(json.dumps(row), flush=True)
    if not as_json:
        _print(rows)
    if plot is not None:
        draw(rows, plot)
    return rows


def _calls(contenders: dict[str, Contender], x: Tensor, pass_: str) -> dict[str, Timed]:
    """What to time of each contender that can do the pass, and on which share of the tokens."""
    calls: dict[str, Timed] = {}
    for name, c in contenders.items():
        share = c.forward_share if pass_ == "forward" else c.train_share
        if share > 0:
            part = x[: round(share * len(x))]
            calls[name] = (_forward(c, part) if pass_ == "forward" else _step(c, part)), share
    return calls


def _forward(contender: Contender, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return contender.call(x)

    return call


def _step(contender: Contender, x: Tensor) -> Callable[[], object]:
    """Gradients of the input and of all parameters, as a training step takes them; no optimizer."""
    train, inputs, gy = contender.train or contender.call, x.detach().requires_grad_(), torch.ones_like(x)
    wanted = [inputs, *contender.parameters]
    return lambda: torch.autograd.grad(train(inputs), wanted, gy)


def _in_turn(calls: dict[str, Timed]) -> dict[str, list[float]]:
    """Wall-clock seconds of each call, one after the other, round after round: slow drifts hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call, _ in calls.values():
        call()
    for _ in range(RUNS):
        for name, (call, share) in calls.items():
            if len(times[name]) >= MIN_RUNS and sum(times[name]) * share > BUDGET_SECONDS:
                continue
            started = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - started) / share)
    return times


def _on_gpu(calls: dict[str, Timed]) -> dict[str, list[float]]:
    """Seconds between CUDA events, the second-level cache cleared before each run."""
    from triton.testing import do_bench  # type: ignore[import-untyped]

    return {
        name: [ms / 1e3 / share for ms in do_bench(call, warmup=50, rep=300, return_mode="all")]
        for name, (call, share) in calls.items()
    }


def _rates(shape: Shape, contender: Contender, pass_: str, seconds: float, dtype: torch.dtype) -> dict[str, Any]:
    """Useful flops and compulsory bytes per second, and how near the roofline that is.

    Compulsory bytes: x and y once, parameters once (all of them: a batch visits nearly every row), twice that and the
    gradients again for the backward pass.
    """
    backward = pass_ != "forward"
    flops = shape.flops(contender.units, backward=backward)
    item = dtype.itemsize
    weights = sum(p.numel() for p in contender.parameters) * item
    activations = shape.tokens * shape.d * item
    moved = 2 * activations + weights + (3 * activations + 2 * weights if backward else 0)
    name = torch.cuda.get_device_name()
    peak = next((p for key, p in PEAKS.items() if key in name), None)
    bound = None if peak is None else max(flops / peak[0 if dtype == torch.bfloat16 else 1], moved / peak[2])
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "tflops": flops / seconds / 1e12,
        "gbytes": moved / seconds / 1e9,
        "roofline": None if bound is None else bound / seconds,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    """A table for each shape and routing: milliseconds, and how many times longer than the tree."""
    console = Console(file=sys.stdout, width=120)
    for shape, routing in dict.fromkeys((r["shape"], r["routing"]) for r in rows):
        mine = [r for r in rows if (r["shape"], r["routing"]) == (shape, routing)]
        s = SHAPES[shape]
        table = Table(
            title=f"Shape {shape}: {s.tokens} tokens, d {s.d}, {s.trees} trees of depth {s.depth}, "
            f"leaf width {s.leaf_width}, {s.total_units} units, {s.active_units} active; "
            f"{routing} routing, {mine[0]['threads']} threads"
        )
        table.add_column("contender")
        for pass_ in dict.fromkeys(r["pass"] for r in mine):
            for column in (f"{pass_} ms", "× tree", "GFLOP/s", *(["of roofline"] if "roofline" in mine[0] else [])):
                table.add_column(column, justify="right")
        units = {
            "tree": s.active_units,
            "dense_active": s.active_units,
            "moe_top1": s.active_units,
            "dense_4d": 4 * s.d,
        }
        for contender in dict.fromkeys(r["contender"] for r in mine):
            cells = [contender]
            for pass_ in dict.fromkeys(r["pass"] for r in mine):
                found = {r["contender"]: r for r in mine if r["pass"] == pass_}
                row = found.get(contender)
                if row is None:
                    cells += ["–"] * (4 if "roofline" in mine[0] else 3)
                    continue
                ratio = row["seconds"] / found["tree"]["seconds"]
                flops = s.flops(units.get(contender, s.total_units), backward=pass_ != "forward")
                cells += [f"{row['seconds'] * 1e3:.2f}", f"{ratio:.2f}", f"{flops / row['seconds'] / 1e9:.0f}"]
                if "roofline" in row:
                    cells.append("–" if row["roofline"] is None else f"{row['roofline']:.0%}")
            table.add_row(*cells)
        console.print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar chart of milliseconds (log scale) to a .svg, .pdf or .png file; a panel for each shape and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    passes = list(dict.fromkeys(r["pass"] for r in rows))
    figure, axes = plt.subplots(
        len(passes), len(shapes), figsize=(4.2 * len(shapes), 2.9 * len(passes)), squeeze=False, layout="constrained"
    )
    for i, pass_ in enumerate(passes):
        for j, shape in enumerate(shapes):
            axis = axes[i][j]
            mine = [r for r in rows if (r["shape"], r["pass"]) == (shape, pass_)]
            names = list(dict.fromkeys(r["contender"] for r in mine))
            routings = list(dict.fromkeys(r["routing"] for r in mine))
            for n, routing in enumerate(routings):
                found = {r["contender"]: r["seconds"] * 1e3 for r in mine if r["routing"] == routing}
                at = [names.index(c) + (n - (len(routings) - 1) / 2) * 0.38 for c in found]
                bars = axis.barh(at, list(found.values()), height=0.36, label=routing, color=("#33658a", "#f6ae2d")[n])
                axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.set_xscale("log")
            axis.margins(x=0.2)
            axis.set_title(f"{shape}, {pass_.replace('_', ' + ')}", fontsize=10)
            axis.set_xlabel("milliseconds")
    axes[0][0].legend(fontsize=8, title=f"{rows[0]['threads']} threads", title_fontsize=8)
    figure.savefig(path)
    plt.close(figure)
