"""`ablate bench layer`: the tree layer beside dense, masked and mixture layers in one run, for ratios one can trust."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ablate.bench.contenders import DEFAULT, SHAPES, Contender, Shape, assert_correct, build, tokens
from ablate.bench.timing import calls_of, in_turn, on_gpu

PASSES = ("forward", "forward_backward")
ROUTINGS = ("iid", "skewed")
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
    contenders: Sequence[str] = DEFAULT,
) -> list[dict[str, Any]]:
    """Median seconds of every contender at named shapes, taken in turn within one run; correctness is asserted first.

    Rows: shape, pass, contender, units (a token uses), threads, routing, seconds (median), runs; printed as JSON lines or as tables, and
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
        built = build(shape, device, dtype, contenders)
        for routing in routings:
            x = tokens(shape, routing, device, dtype)
            assert_correct(shape, built, x)
            for pass_ in passes:
                calls = calls_of(built, x, pass_)
                times = in_turn(calls) if device == "cpu" else on_gpu(calls)
                for contender, seconds in times.items():
                    row: dict[str, Any] = {
                        "shape": name,
                        "pass": pass_,
                        "contender": contender,
                        "units": built[contender].units,
                        "threads": torch.get_num_threads(),
                        "routing": routing,
                        "seconds": statistics.median(seconds),
                        "runs": len(seconds),
                    }
                    if device != "cpu":
                        row |= _rates(shape, built[contender], pass_, row["seconds"], dtype)
                    rows.append(row)
                    if as_json:
                        print(json.dumps(row), flush=True)
    if not as_json:
        _print(rows)
    if plot is not None:
        draw(rows, plot)
    return rows


def _rates(shape: Shape, contender: Contender, pass_: str, seconds: float, dtype: torch.dtype) -> dict[str, Any]:
    """Useful flops and compulsory bytes per second, and how near the roofline that is."""
    backward = pass_ != "forward"
    flops = shape.flops(contender.units, backward=backward)
    moved = contender.moved(shape, dtype.itemsize, backward=backward)
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
        for contender in dict.fromkeys(r["contender"] for r in mine):
            cells = [contender]
            for pass_ in dict.fromkeys(r["pass"] for r in mine):
                found = {r["contender"]: r for r in mine if r["pass"] == pass_}
                row = found.get(contender)
                if row is None:
                    cells += ["–"] * (4 if "roofline" in mine[0] else 3)
                    continue
                ratio = row["seconds"] / found["tree"]["seconds"]
                flops = s.flops(row["units"], backward=pass_ != "forward")
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
