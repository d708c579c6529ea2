"""Counts of flops, bytes and launches for each strategy, and the time they would take: a model, not a measurement.

`fastest` chooses the strategy where nothing was measured; `python -m ablate.kernels.triton.predict` prints the tables
of docs/kernels.md. Every launch is taken to last as long as its slowest resource, plus a fixed start; tokens are taken
to be spread evenly over leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton.tiling import STRATEGIES, DType, Piece, Strategy, Tiling, configs, grad_pieces, make_tiling


class Step(NamedTuple):
    """One launch: flops, bytes asked of the second-level cache, bytes that memory must move at least once."""

    name: str
    matrix_flops: float = 0.0
    scalar_flops: float = 0.0
    cache_bytes: float = 0.0
    memory_bytes: float = 0.0
    sorts: int = 0


@dataclass(frozen=True, slots=True)
class Device:
    """Rates per second. Matrix rates are what large products reach, not the peak of the data sheet."""

    name: str
    matrix: dict[DType, float]
    scalar: float
    cache: float
    memory: float
    launch_seconds: float
    sort_seconds: float


# Assumed, none of it measured by us: dense peaks 989 (bf16) and 67 (fp32, no TF32) TFLOP/s, 3.35 TB/s of memory, about
# 5.5 TB/s of second-level cache; 60% of the peaks; 3 us between dependent launches; 25 us for a segmented radix sort.
H100 = Device("H100 SXM", {"bf16": 600e12, "fp32": 40e12}, 40e12, 5.5e12, 2.7e12, 3e-6, 25e-6)
_ITEM: dict[DType, int] = {"bf16": 2, "fp32": 4}


def seconds(steps: Iterable[Step], dtype: DType, device: Device = H100) -> float:
    """Predicted time of launches that run one after another."""
    return sum(
        max(
            s.matrix_flops / device.matrix[dtype],
            s.scalar_flops / device.scalar,
            s.cache_bytes / device.cache,
            s.memory_bytes / device.memory,
        )
        + (device.sort_seconds * s.sorts if s.sorts else device.launch_seconds)
        for s in steps
    )


def forward_steps(spec: TreeSpec, tokens: int, d: int, dtype: DType, strategy: Strategy) -> list[Step]:
    """What one forward pass launches on a strategy."""
    tiling = make_tiling(spec, tokens, dtype, strategy)
    steps = _down(spec, tiling, tokens, d, dtype, routes=True)
    if spec.placement == "unit":
        cells = tokens * spec.trees * spec.path
        steps.append(Step("activate", scalar_flops=20 * cells, cache_bytes=8 * cells, memory_bytes=8 * cells))
    return steps + _up(spec, tiling, tokens, d, dtype, spec.node_output)


def backward_steps(spec: TreeSpec, tokens: int, d: int, dtype: DType, strategy: Strategy) -> list[Step]:
    """What one backward pass launches on a strategy, for the gradients of x, w_in, b and w_out."""
    tiling, item = make_tiling(spec, tokens, dtype, strategy), _ITEM[dtype]
    cells = tokens * spec.trees * spec.path
    steps = [Step("sort", sorts=1)] if any(p.tiles > 1 for p in grad_pieces(spec)) else []
    if spec.placement == "unit":
        steps.append(Step("path_grad", scalar_flops=40 * cells, cache_bytes=16 * cells, memory_bytes=16 * cells))
    else:
        steps += _up(spec, tiling, tokens, d, dtype, spec.node_output)
    steps += _down(spec, tiling, tokens, d, dtype, routes=False)
    steps += _up(spec, tiling, tokens, d, dtype, spec.node_output)
    bt = configs("tile_wgrad", dtype)[0].bt
    for piece in grad_pieces(spec):
        if piece.height and not spec.node_output:
            continue
        blocks = spec.trees * (tokens / bt + piece.tiles) * piece.chunks
        rows = spec.trees * piece.tiles * piece.chunks * piece.lanes
        once = Step(
            "tile_wgrad",
            matrix_flops=2 * blocks * bt * piece.lanes * d,
            cache_bytes=blocks * bt * d * item + rows * d * item,
            memory_bytes=tokens * d * item + rows * d * item,
        )
        steps += [once, once]
    return steps


def fastest(spec: TreeSpec, tokens: int, d: int, dtype: DType, device: Device = H100) -> Strategy:
    """The strategy with the least predicted forward time; the device is fixed unless given, so machines agree."""
    return min(STRATEGIES, key=lambda r: seconds(forward_steps(spec, tokens, d, dtype, r), dtype, device))


def _visits(piece: Piece, tokens: int, bt: int, in_order: bool) -> float:
    """Products of token blocks with tiles, in all: a sorted block meets few tiles, an unsorted one all it hits."""
    if in_order:
        return tokens / bt + min(piece.tiles, tokens)
    return math.ceil(tokens / bt) * piece.tiles * (1 - (1 - 1 / piece.tiles) ** min(bt, tokens))


def _down(spec: TreeSpec, tiling: Tiling, tokens: int, d: int, dtype: DType, *, routes: bool) -> list[Step]:
    """The passes that multiply tokens with their path's rows: responses, or the gradients of the units' outputs."""
    item, steps = _ITEM[dtype], []
    sorted_tiles = 1
    for piece in tiling.pieces:
        if routes and tiling.sorted and piece.tiles > sorted_tiles:
            steps.append(Step("sort", sorts=1))
            sorted_tiles = piece.tiles
        bt = configs("tile_dots" if piece.height else "leaf_dots", dtype)[0].bt
        visits = spec.trees * _visits(piece, tokens, bt, tiling.sorted)
        lanes = piece.lanes * piece.chunks
        steps.append(
            Step(
                "tile_dots",
                matrix_flops=2 * visits * bt * lanes * d,
                cache_bytes=visits * (bt + lanes) * d * item,
                memory_bytes=(tokens + spec.trees * piece.tiles * lanes) * d * item,
            )
        )
    units = spec.depth - tiling.row_level + (spec.leaf_width if tiling.leaves is None else 0)
    if units:
        reads = spec.trees * tokens * units * d
        touched = min(reads, spec.trees * spec.in_rows * d)
        steps.append(Step("row_dots", 0, 2 * reads, 2 * reads * item, (tokens * d + touched) * item))
    return steps


def _up(spec: TreeSpec, tiling: Tiling, tokens: int, d: int, dtype: DType, nodes: bool) -> list[Step]:
    """The pass that adds up every path's rows: output, input gradient, or the sum inside phi."""
    item, bt = _ITEM[dtype], configs("spread", dtype)[0].bt
    pieces = [p for p in tiling.pieces if nodes or not p.height]
    flops = cache = 0.0
    for piece in pieces:
        visits = spec.trees * _visits(piece, tokens, bt, tiling.sorted)
        flops += 2 * visits * bt * piece.lanes * piece.chunks * d
        cache += visits * piece.lanes * piece.chunks * d * item
    units = (spec.depth - tiling.row_level) * nodes + (spec.leaf_width if tiling.leaves is None else 0)
    scalar = 2.0 * spec.trees * tokens * units * d
    cache += scalar / 2 * item
    launches = spec.trees if tiling.sorted else 1
    cache += tokens * d * (8 * (launches - 1) + item)
    touched = min(spec.trees * tokens * spec.path, spec.trees * spec.out_rows)
    memory = (tokens + touched) * d * item
    return [Step("spread", flops / launches, scalar / launches, cache / launches, memory / launches)] * launches


def times_table() -> str:
    """The predictions of docs/kernels.md as Markdown."""
    tokens = 8192
    dtype: DType = "bf16"
    lines = [
        "| d | D | K | " + " | ".join(f"{r} fwd" for r in STRATEGIES) + " | chosen | fwd+bwd | dense 4d fwd |",
        "|" + "---|" * (6 + len(STRATEGIES)),
    ]
    for d in (768, 2048):
        dense = seconds([Step("up", 8.0 * tokens * d * d), Step("down", 8.0 * tokens * d * d)], dtype)
        for depth in (8, 10, 12):
            for trees in (1, 4, 8):
                spec = TreeSpec(trees=trees, depth=depth, leaf_width=1)
                ahead = {r: seconds(forward_steps(spec, tokens, d, dtype, r), dtype) for r in STRATEGIES}
                best = fastest(spec, tokens, d, dtype)
                both = ahead[best] + seconds(backward_steps(spec, tokens, d, dtype, best), dtype)
                cells = " | ".join(f"{1e6 * ahead[r]:.0f}" for r in STRATEGIES)
                lines.append(f"| {d} | {depth} | {trees} | {cells} | {best} | {1e6 * both:.0f} | {1e6 * dense:.0f} |")
    return "\n".join(lines)


def counts_table() -> str:
    """Flops and bytes of each strategy for two shapes, as Markdown."""
    tokens, d = 8192, 768
    dtype: DType = "bf16"
    lines = ["| D | strategy | launches | matrix GFLOP | scalar GFLOP | cache MB | memory MB | us |", "|" + "---|" * 8]
    for depth in (8, 12):
        spec = TreeSpec(trees=1, depth=depth, leaf_width=1)
        for strategy in STRATEGIES:
            steps = forward_steps(spec, tokens, d, dtype, strategy)
            totals = (
                sum(s.matrix_flops for s in steps) / 1e9,
                sum(s.scalar_flops for s in steps) / 1e9,
                sum(s.cache_bytes for s in steps) / 1e6,
                sum(s.memory_bytes for s in steps) / 1e6,
            )
            cells = " | ".join(f"{v:.2g}" if v < 10 else f"{v:.0f}" for v in totals)
            took = 1e6 * seconds(steps, dtype)
            lines.append(f"| {depth} | {strategy} | {len(steps)} | {cells} | {took:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(counts_table(), times_table(), sep="\n\n")
