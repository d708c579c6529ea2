"""The tree layer as dense products and a mask, for trees so shallow that most units are active anyway. Plain PyTorch.

The same values as the sparse kernels, and the same saved state; only placement `unit` comes this way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.activations import phi, phi_slope
from ablate.kernels.reference import path_rows, walk
from ablate.kernels.spec import TreeSpec


def forward(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    leaves: Tensor | None,
    spec: TreeSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpu.forward`, in O(N·U·d)."""
    every = F.linear(x, w_in.flatten(0, 1), None if b is None else b.flatten()).view(-1, spec.trees, spec.in_rows)
    if leaves is None:
        leaves = walk(every[..., : spec.nodes], thresholds, spec.depth)
    rows = path_rows(leaves, spec)
    z = every.gather(2, rows)
    h = _spread(_halves(z, spec, slopes=False), rows, spec)
    return h.flatten(1) @ w_out.flatten(0, 1), leaves.int(), z


def backward(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    leaves: Tensor,
    z: Tensor,
    spec: TreeSpec,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `cpu.backward`, in O(N·U·d); what is not needed is empty."""
    none = x.new_empty(0)
    gx, gw_in, gb, gw_out = none, none, none, none
    rows = path_rows(leaves, spec)
    if needs[3]:
        gw_out = (_spread(_halves(z, spec, slopes=False), rows, spec).flatten(1).T @ gy).view_as(w_out)
    if any(needs[:3]):
        gh = (gy @ w_out.flatten(0, 1).T).view(-1, spec.trees, spec.out_rows)
        active = rows if spec.node_output else rows[..., spec.depth :] - spec.nodes
        dz = gh.gather(2, active) * _halves(z, spec, slopes=True)[..., z.shape[2] - active.shape[2] :]
        dz = x.new_zeros(len(x), spec.trees, spec.in_rows).scatter_(2, rows[..., z.shape[2] - active.shape[2] :], dz)
        gx = dz.flatten(1) @ w_in.flatten(0, 1)
        gw_in, gb = (dz.flatten(1).T @ x).view_as(w_in), dz.sum(0)
    return gx, gw_in, gb, gw_out


def _spread(h: Tensor, rows: Tensor, spec: TreeSpec) -> Tensor:
    """h [N, K, D + W] in its rows of w_out [N, K, R], zero elsewhere."""
    if not spec.node_output:
        h, rows = h[..., spec.depth :], rows[..., spec.depth :] - spec.nodes
    return h.new_zeros(*h.shape[:2], spec.out_rows).scatter_(2, rows, h)


def _halves(z: Tensor, spec: TreeSpec, *, slopes: bool) -> Tensor:
    """phi or its slope: nodes with the nodes' mirror and gain, leaf units with theirs."""
    function = phi_slope if slopes else phi
    node = function(z[..., : spec.depth], spec.activation, spec.node_mirror, spec.node_gain)
    return torch.cat([node, function(z[..., spec.depth :], spec.activation, spec.mirror, spec.leaf_gain)], dim=-1)
