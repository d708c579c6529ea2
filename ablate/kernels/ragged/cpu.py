"""Ragged trees on CPUs: the host side of `passes`. bfloat16 and float16 are computed in float32 and cast back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ablate.kernels.activations import phi, phi_slope
from ablate.kernels.backend import Forward, Gradients
from ablate.kernels.cpu.host import activation_table, empty, launch, plain
from ablate.kernels.ragged import passes
from ablate.kernels.ragged.shape import Shape
from ablate.kernels.spec import TreeSpec


def forward(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor,
    leaves: Tensor | None,
    shape: Shape,
    spec: TreeSpec,
) -> Forward:
    """Compute the layer; y is in x's dtype."""
    dtype = x.dtype
    x, w_in, b, w_out = plain(x), plain(w_in), plain(b), plain(w_out)
    z, taken = _down(x, w_in, b, thresholds, leaves, shape, spec, units=True, all_nodes=True)
    if spec.placement == "unit":
        y = _up(z, w_out, taken, shape, spec, 0, spec.trees)
    else:
        parts = (
            phi(_up(z, w_out, taken, shape, spec, *r), spec.activation, spec.mirror, spec.leaf_gain)
            for r in _ranges(spec)
        )
        y = next(parts)
        for part in parts:
            y += part
    return y.to(dtype), taken, z


def route(
    x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor, shape: Shape, spec: TreeSpec
) -> tuple[Tensor, Tensor]:
    """Return leaves int32 [N, K] and responses [N, K, D] of the nodes that decided."""
    z, leaves = _down(plain(x), plain(w_in), plain(b), thresholds, None, shape, spec, units=False, all_nodes=False)
    return leaves, z[..., : spec.depth]


def backward(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    leaves: Tensor,
    responses: Tensor,
    shape: Shape,
    spec: TreeSpec,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of x, w_in, b and w_out for the path that was taken, None where `needs` is False."""
    dtype = x.dtype
    x, w_in, w_out, gy = plain(x), plain(w_in), plain(w_out), plain(gy)
    grads = torch.zeros_like(x), torch.zeros_like(w_in), w_in.new_zeros(len(w_in)), torch.zeros_like(w_out)
    if spec.placement == "unit":
        _chain(gy, x, w_in, w_out, leaves, responses, grads, needs, shape, spec, 0, spec.trees)
    else:
        for k0, k1 in _ranges(spec):
            summed = _up(responses, w_out, leaves, shape, spec, k0, k1)
            gs = phi_slope(summed, spec.activation, spec.mirror, spec.leaf_gain).mul_(gy)
            _chain(gs, x, w_in, w_out, leaves, responses, grads, needs, shape, spec, k0, k1)
    wanted = [n and (i != 2 or b is not None) for i, n in enumerate(needs)]
    return tuple(g.to(dtype) if n else None for g, n in zip(grads, wanted, strict=True))  # type: ignore[return-value]


def _down(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    thresholds: Tensor,
    leaves: Tensor | None,
    shape: Shape,
    spec: TreeSpec,
    *,
    units: bool,
    all_nodes: bool,
) -> tuple[Tensor, Tensor]:
    """Return responses [N, K, D + W], 0 where none was computed, and leaves int32 [N, K]."""
    n = x.shape[0]
    taken = x.new_empty((n, spec.trees), dtype=torch.int32) if leaves is None else leaves.int().contiguous()
    z = x.new_zeros(n, spec.trees, spec.path)
    limits = thresholds.detach().to(x.dtype).contiguous()
    launch(
        passes.down, x, w_in, x.new_empty(0) if b is None else b, b is not None, limits, shape.roots, shape.branches,
        shape.split, taken, leaves is not None, z, units, all_nodes, spec.depth, spec.leaf_width, _block(n),
    )  # fmt: skip
    return z, taken


def _up(z: Tensor, w_out: Tensor, leaves: Tensor, shape: Shape, spec: TreeSpec, k0: int, k1: int) -> Tensor:
    """Return the sum [N, d] of the outputs of the units on the paths in trees k0..k1."""
    y = empty(z.shape[0], w_out.shape[1], like=z)
    out_nodes = len(shape.branches) if spec.node_output else 0
    launch(
        passes.up, z, activation_table(spec), w_out, out_nodes, leaves, y, shape.trees, shape.paths, shape.lengths, k0, k1,
        spec.depth, spec.leaf_width, _block(z.shape[0]),
    )  # fmt: skip
    return y


def _ranges(spec: TreeSpec) -> list[tuple[int, int]]:
    """Return the ranges of trees whose outputs are summed before phi."""
    return [(k, k + 1) for k in range(spec.trees)] if spec.placement == "tree" else [(0, spec.trees)]


def _chain(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    leaves: Tensor,
    z: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    needs: Sequence[bool],
    shape: Shape,
    spec: TreeSpec,
    k0: int,
    k1: int,
) -> None:
    """Add the gradients of trees k0..k1 to `grads`; `gy` is the gradient of the sum of their units' outputs."""
    gx, gw_in, gb, gw_out = grads
    nodes, n = len(shape.branches), x.shape[0]
    out_nodes = nodes if spec.node_output else 0
    wants_in, wants_out = needs[1] or needs[2], needs[3]
    dz, acts = torch.zeros_like(z), activation_table(spec)
    launch(
        passes.back, gy, w_out, out_nodes, w_in, z, acts, leaves, dz, gx, needs[0], shape.trees, shape.paths,
        shape.lengths, nodes, k0, k1, spec.depth, spec.leaf_width, _block(n),
    )  # fmt: skip
    if wants_in or wants_out:
        starts = np.empty(len(shape.lengths) + spec.trees, np.int64)
        order = np.empty((spec.trees, n), np.int64)
        asked = torch.where((shape.tree_of >= k0) & (shape.tree_of < k1), shape.tree_of, -1)
        launch(passes.sort, leaves, shape.trees, k0, k1, starts, order)
        launch(
            passes.gradients, x, gy, z, acts, dz, order, starts, asked, shape.levels, shape.spans, gw_in, gb, gw_out,
            out_nodes, wants_in, wants_out, spec.depth, spec.leaf_width,
        )  # fmt: skip


def _block(tokens: int) -> int:
    """Return the tokens of one task: enough that a leaf's share of them is more than one or two."""
    return max(1, min(2048, tokens))
