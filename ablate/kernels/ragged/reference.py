"""The definition of ragged trees: plain PyTorch, any device and dtype, with gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.kernels.activations import phi
from ablate.kernels.backend import Forward
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
    """Compute every unit, then mask to the path."""
    nodes, width = len(shape.branches), spec.leaf_width
    z = x @ w_in.T
    z = z if b is None else z + b
    if leaves is None:
        leaves = walk(z.detach(), thresholds, shape, spec.depth)
    taken = leaves.long()
    paths = shape.paths.to(x.device)[taken]
    units = nodes + taken[..., None] * width + torch.arange(width, device=x.device)
    rows = torch.cat([paths, units], dim=2)
    on_path = rows >= 0
    responses = z.detach().gather(1, rows.clamp(min=0).flatten(1)).view(rows.shape) * on_path
    first = 0 if spec.node_output else nodes
    # One row more than there is, for places beyond the end of a path.
    mask = torch.zeros(*taken.shape, z.shape[1] + 1, dtype=torch.bool, device=x.device)
    mask = mask.scatter(2, torch.where(on_path, rows, z.shape[1]), True)[..., first:-1]
    z = z[:, first:]
    if spec.placement != "unit":
        summed = torch.einsum("nku,ud->nkd", z[:, None] * mask, w_out)
        if spec.placement == "sum":
            summed = summed.sum(1, keepdim=True)
        y = phi(summed, spec.activation, spec.mirror, spec.leaf_gain).sum(1)
        return y, taken.int(), responses
    cut = nodes - first
    hidden = [
        phi(z[:, :cut], spec.activation, spec.node_mirror, spec.node_gain),
        phi(z[:, cut:], spec.activation, spec.mirror, spec.leaf_gain),
    ]
    return (torch.cat(hidden, dim=1) * mask.any(1)) @ w_out, taken.int(), responses


def route(
    x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor, shape: Shape, spec: TreeSpec
) -> tuple[Tensor, Tensor]:
    """Return leaves int32 [N, K] and responses [N, K, D] of the nodes that decided, for x [N, d]; no outputs."""
    with torch.no_grad():
        nodes = len(shape.branches)
        z = x @ w_in[:nodes].T
        z = z if b is None else z + b[:nodes]
        leaves = walk(z, thresholds, shape, spec.depth)
        paths = shape.paths.to(z.device)[leaves.long()]
        decides = (shape.branches[:, 0] != shape.branches[:, 1]).to(z.device)
        known = (paths >= 0) & (decides[paths] if nodes else False)
        picked = z.gather(1, paths.clamp(min=0).flatten(1)).view(paths.shape) if nodes else z.new_zeros(paths.shape)
        return leaves, picked * known


def walk(z: Tensor, thresholds: Tensor, shape: Shape, depth: int) -> Tensor:
    """Return leaves int32 [N, K] from the responses z [N, at least n] of all nodes."""
    roots, branches = shape.roots.to(z.device), shape.branches.to(z.device)
    at = roots.expand(z.shape[0], -1)
    if len(branches):
        right = (z[:, : len(branches)] > thresholds).long()
        for _ in range(depth):
            node = at.clamp(min=0)
            at = torch.where(at >= 0, branches[node, right.gather(1, node)], at)
    return (~at).int()
