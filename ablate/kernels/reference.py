"""The definition of the layer: every unit is computed, then masked to the path. Plain PyTorch, any dtype, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.kernels.activations import phi, phi_slope
from ablate.kernels.spec import NodeBackward, TreeSpec


def node_slope(z: Tensor, spec: TreeSpec, node_backward: NodeBackward = "own") -> Tensor:
    """phi' of nodes as `node_backward` has it, elementwise.

    own: phi'(z). flip: phi'(-z). flat: the mean of the two. base: f'(z), the slope without the mirror.
    """
    match node_backward:
        case "own":
            return phi_slope(z, spec.activation, spec.node_mirror, spec.node_gain)
        case "flip":
            return phi_slope(-z, spec.activation, spec.node_mirror, spec.node_gain)
        case "flat":
            return (node_slope(z, spec) + node_slope(z, spec, "flip")) / 2
        case "base":
            return phi_slope(z, spec.activation, 0.0, spec.node_gain)


def walk(z: Tensor, thresholds: Tensor | None, depth: int) -> Tensor:
    """Leaf index int64 [N, K] reached from node responses z [N, K, M]: right where z > t, left otherwise."""
    goes_right = z > 0 if thresholds is None else z > thresholds
    node = torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device)
    for _ in range(depth):
        node = 2 * node + 1 + goes_right.gather(2, node[..., None]).squeeze(2)
    return node - ((1 << depth) - 1)


def path_nodes(leaves: Tensor, depth: int) -> Tensor:
    """Heap indices int64 [N, K, D] of the nodes above each leaf, root first."""
    levels = torch.arange(depth, device=leaves.device)
    return ((leaves.long()[..., None] + (1 << depth)) >> (depth - levels)) - 1


def path_rows(leaves: Tensor, spec: TreeSpec) -> Tensor:
    """Rows int64 [N, K, D + W] of `w_in` on each token's path: nodes root first, then the leaf's units."""
    units = torch.arange(spec.leaf_width, device=leaves.device)
    leaf_rows = spec.nodes + leaves.long()[..., None] * spec.leaf_width + units
    return torch.cat([path_nodes(leaves, spec.depth), leaf_rows], dim=2)


def route(
    x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor | None, spec: TreeSpec
) -> tuple[Tensor, Tensor]:
    """Leaves int32 [N, K] and node responses on the path [N, K, D] for x [N, d]; outputs are not computed."""
    with torch.no_grad():
        z = torch.einsum("nd,kmd->nkm", x, w_in[:, : spec.nodes])
        if b is not None:
            z = z + b[:, : spec.nodes]
        leaves = walk(z, thresholds, spec.depth)
        return leaves.int(), z.gather(2, path_nodes(leaves, spec.depth))


def forward(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    leaves: Tensor | None,
    spec: TreeSpec,
    node_backward: NodeBackward = "own",
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer for x [N, d]: y [N, d], leaves int32 [N, K] and path responses [N, K, D + W] (the last two detached).

    `w_in` [K, M + L·W, d], `b` [K, M + L·W] or None, `w_out` [K, R, d], `thresholds` [K, M] or None, `leaves` [N, K] or
    None (then the tree routes). The branch decision carries no gradient (arXiv 2604.08565).
    """
    z = torch.einsum("nd,kud->nku", x, w_in)
    if b is not None:
        z = z + b
    if leaves is None:
        leaves = walk(z.detach()[..., : spec.nodes], thresholds, spec.depth)
    rows = path_rows(leaves, spec)
    responses = z.detach().gather(2, rows)
    if not spec.node_output:
        z, rows = z[..., spec.nodes :], rows[..., spec.depth :] - spec.nodes
    mask = torch.zeros(z.shape, dtype=torch.bool, device=z.device).scatter_(2, rows, True)
    if spec.placement != "unit":
        summed = torch.einsum("nku,kud->nkd", z * mask, w_out)
        if spec.placement == "sum":
            summed = summed.sum(1, keepdim=True)
        y = phi(summed, spec.activation, spec.mirror, spec.leaf_gain).sum(1)
        return y, leaves.int(), responses
    nodes = spec.nodes if spec.node_output else 0
    zn, zl = z[..., :nodes], z[..., nodes:]
    hn = phi(zn, spec.activation, spec.node_mirror, spec.node_gain)
    if node_backward != "own":
        hn = _other_slope(hn, zn, x, w_in[:, :nodes], None if b is None else b[:, :nodes], spec, node_backward)
    h = torch.cat([hn, phi(zl, spec.activation, spec.mirror, spec.leaf_gain)], dim=2)
    return torch.einsum("nku,kud->nd", h * mask, w_out), leaves.int(), responses


def _other_slope(
    h: Tensor, z: Tensor, x: Tensor, w: Tensor, b: Tensor | None, spec: TreeSpec, node_backward: NodeBackward
) -> Tensor:
    """The same values as h, but phi'(z) replaced in the gradients of w and b only; x keeps the true slope."""
    slope, instead = node_slope(z.detach(), spec), node_slope(z.detach(), spec, node_backward)
    z_input = torch.einsum("nd,kud->nku", x, w.detach())
    z_weight = torch.einsum("nd,kud->nku", x.detach(), w)
    if b is not None:
        z_weight = z_weight + b
    change = slope * (z_input - z_input.detach()) + instead * (z_weight - z_weight.detach())
    return h.detach() + change
