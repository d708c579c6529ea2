"""The tree layer on CPUs: host side. Cost follows the units on the path, never all units.

Time O(N·K·(D + W)·d), memory beyond inputs and results O(N·K·(D + W) + N·d). float32 and float64; bfloat16 and float16
are computed in float32 and cast back. Where leaves are given, node responses are computed too, also with `node_output`
off, as the reference does. Threads are torch's (`torch.get_num_threads`); results are bitwise the same for any number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ablate.kernels.activations import phi, phi_slope
from ablate.kernels.backend import Forward, Gradients
from ablate.kernels.cpu import decode_step, passes, weight_grad
from ablate.kernels.cpu.host import activation_table, empty, launch, plain
from ablate.kernels.cpu.tasks import BLOCK, Tasks, cut
from ablate.kernels.spec import TreeSpec


def forward(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    leaves: Tensor | None,
    spec: TreeSpec,
) -> Forward:
    """Compute the layer; y is in x's dtype."""
    dtype = x.dtype
    x, w_in, b, w_out = plain(x), plain(w_in), plain(b), plain(w_out)
    how = cut(x.shape[0], spec, torch.get_num_threads())
    z, leaves, order = _down(x, w_in, b, thresholds, leaves, spec, spec.path, how)
    y = empty(*x.shape, like=x)
    if spec.placement == "tree":
        y.zero_()
        part = torch.empty_like(y)
        for k in range(spec.trees):
            _up(z, w_out, leaves, order, part, spec, how, k, k + 1)
            y += phi(part, spec.activation, spec.mirror, spec.leaf_gain)
    else:
        _up(z, w_out, leaves, order, y, spec, how, 0, spec.trees)
        if spec.placement == "sum":
            y = phi(y, spec.activation, spec.mirror, spec.leaf_gain)
    return y.to(dtype), leaves, z


def route(
    x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor | None, spec: TreeSpec
) -> tuple[Tensor, Tensor]:
    """Return leaves int32 [N, K] and node responses on the path [N, K, D]; outputs are not computed."""
    x, w_in, b = plain(x), plain(w_in), plain(b)
    how = cut(x.shape[0], spec, torch.get_num_threads())
    z, leaves, _ = _down(x, w_in, b, thresholds, None, spec, spec.depth, how)
    return leaves, z


def backward(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    leaves: Tensor,
    responses: Tensor,
    spec: TreeSpec,
    needs: tuple[bool, ...],
) -> Gradients:
    """Return the gradients of x, w_in, b and w_out for the path that was taken, None where `needs` is False.

    For the placements `tree` and `sum` the outputs' sums are computed again, one [N, d] at a time.
    """
    dtype = x.dtype
    x, w_in, b, w_out, gy = plain(x), plain(w_in), plain(b), plain(w_out), plain(gy)
    leaves = leaves.contiguous()
    how = cut(x.shape[0], spec, torch.get_num_threads())
    grads = _backward(gy, x, w_in, w_out, leaves, responses, spec, needs, how)
    return tuple(g.to(dtype) if n else None for g, n in zip(grads, needs, strict=True))  # type: ignore[return-value]


def decoder(
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    router_w: Tensor | None,
    router_b: Tensor | None,
    spec: TreeSpec,
) -> Callable[[Tensor], Tensor] | None:
    """Return a function y [N, d] of x [N, d] for a few tokens; None for weights that are not float32 or float64."""
    if w_in.dtype not in {torch.float32, torch.float64}:
        return None
    return decode_step.prepare(w_in, b, w_out, thresholds, router_w, router_b, spec)


def version() -> str:
    """Return the size of tasks: nothing else is chosen."""
    return f"tasks of {BLOCK} tokens"


def _backward(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    leaves: Tensor,
    z: Tensor,
    spec: TreeSpec,
    needs: tuple[bool, ...],
    how: Tasks,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, d), trees = x.shape, spec.trees
    needs_in = needs[1] or needs[2]
    gx = empty(n, d, like=x) if needs[0] else x.new_empty(0, d)
    gw_in = torch.empty_like(w_in) if needs_in else x.new_empty(0, 0, d)
    gb = torch.empty_like(w_in[..., 0]) if needs_in else x.new_empty(0, 0)
    gw_out = torch.empty_like(w_out) if needs[3] else w_out.new_empty(0, *w_out.shape[1:])
    if not spec.node_output:
        gw_in[:, : spec.nodes] = 0
        gb[:, : spec.nodes] = 0
    starts, order = np.empty((trees, spec.leaves + 1), np.int64), np.empty((trees, n), np.int64)
    launch(weight_grad.sort, leaves, 0, trees, starts, order)
    dz, acts, tail = torch.empty_like(z), activation_table(spec), (spec.depth, spec.leaf_width)
    partial = x.new_empty(trees, how.chunks, 2, spec.path, 2, d + 1)
    rows = np.empty((trees, how.chunks, 2, spec.path), np.int64)
    wants = (needs_in, needs[3])
    for k0, k1 in [(k, k + 1) for k in range(trees)] if spec.placement == "tree" else [(0, trees)]:
        gs = gy
        if spec.placement != "unit":
            gs = torch.empty_like(gy)
            _up(z, w_out, leaves, order, gs, spec, how, k0, k1)
            gs = phi_slope(gs, spec.activation, spec.mirror, spec.leaf_gain).mul_(gy)
        if needs[0] or needs_in:
            # Trees add to the same rows of gx, and their orders differ: one after another.
            for k in range(k0, k1):
                launch(
                    passes.back, gs, w_out, w_in, z, acts, leaves, order, dz, gx, k > 0, needs[0], k, k + 1,
                    *tail, how.range,
                )  # fmt: skip
        if needs_in or needs[3]:
            launch(
                weight_grad.gradients, x, gs, z, acts, dz, order, starts, gw_in, gb, gw_out, partial, rows,
                *wants, k0, k1, *tail,
            )  # fmt: skip
            launch(weight_grad.join, gw_in, gb, gw_out, partial, rows, *wants, k0, k1, *tail)
    return gx, gw_in, gb, gw_out


def _down(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    thresholds: Tensor | None,
    leaves: Tensor | None,
    spec: TreeSpec,
    width: int,
    how: Tasks,
) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Return responses [N, K, width], width D or D + W; leaves int32 [N, K]; tokens by leaf [K, N], within blocks."""
    n = x.shape[0]
    given = leaves is not None
    taken = x.new_empty((n, spec.trees), dtype=torch.int32) if leaves is None else leaves.int().contiguous()
    z = x.new_empty(n, spec.trees, width)
    order = np.empty((spec.trees, n), np.int64)
    none = x.new_empty(0, 0)
    t = none if thresholds is None else thresholds.to(x.dtype).contiguous()
    launch(
        passes.down, x, w_in, none if b is None else b, b is not None, t, thresholds is not None, taken, given, z,
        order, spec.depth, spec.leaf_width, how.block,
    )  # fmt: skip
    return z, taken, order


def _up(
    z: Tensor,
    w_out: Tensor,
    leaves: Tensor,
    order: NDArray[np.int64],
    y: Tensor,
    spec: TreeSpec,
    how: Tasks,
    k0: int,
    k1: int,
) -> None:
    """Write into y [N, d] what the units on the paths in trees k0..k1 add up to, one tree after another."""
    acts = activation_table(spec)
    for k in range(k0, k1):
        launch(passes.up, z, acts, w_out, leaves, order, y, k > k0, k, k + 1, spec.depth, spec.leaf_width, how.range)
