"""What the gradient and the router do at each node of one layer: sums over tokens, in torch, streamed batch by batch.

Shapes as everywhere: N tokens, K trees, D depth, W leaf width, M nodes per tree, d model width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ablate.balance import metrics
from ablate.distributed import sum_over_ranks
from ablate.kernels.activations import phi_slope
from ablate.kernels.reference import node_slope, path_nodes, path_rows
from ablate.kernels.spec import NodeBackward, TreeSpec

GATHER_BUDGET = 1 << 23
"""Floats of gathered weight rows in memory at a time."""


def node_gradients(
    gy: Tensor,
    w_out: Tensor,
    leaves: Tensor,
    responses: Tensor,
    spec: TreeSpec,
    node_backward: NodeBackward = "own",
) -> Tensor:
    """∂l/∂z [N, K, D] of the nodes on each token's path, from the output's gradient gy [N, d].

    `w_out` [K, R, d], `leaves` int [N, K], `responses` [N, K, D + W] as the layer reports them. unit:
    dz = <gy, w_out[n]> phi'(z_n); tree and sum: dz = <gy ⊙ phi'(s), w_out[n]> with s the tree's (all trees') sum before
    phi. With another `node_backward` it is the gradient that reaches w_in and b. Raises ValueError where nodes have no
    output.
    """
    if not spec.node_output:
        raise ValueError("node_output is off: nodes get no gradient")
    rows = path_rows(leaves, spec)
    if spec.placement == "unit":
        rows = rows[..., : spec.depth]
    trees = torch.arange(spec.trees, device=gy.device)[:, None]
    chunk = max(1, GATHER_BUDGET // max(1, spec.trees * rows.shape[2] * gy.shape[1]))
    parts = []
    for start in range(0, gy.shape[0], chunk):
        here = slice(start, start + chunk)
        w, g, z = w_out[trees, rows[here]], gy[here], responses[here]
        if spec.placement == "unit":
            dz = torch.einsum("nd,nkpd->nkp", g, w) * node_slope(z[..., : spec.depth], spec, node_backward)
        else:
            s = torch.einsum("nkp,nkpd->nkd", z.to(w.dtype), w)
            if spec.placement == "sum":
                s = s.sum(1, keepdim=True).expand_as(s)
            inner = g[:, None] * phi_slope(s, spec.activation, spec.mirror, spec.leaf_gain)
            dz = torch.einsum("nkd,nkpd->nkp", inner, w[:, :, : spec.depth])
        parts.append(dz)
    return torch.cat(parts) if parts else gy.new_zeros(0, spec.trees, spec.depth)


class NodeSums:
    """Sums over tokens for the nodes of one layer, from which gradient skew and router offset follow."""

    def __init__(self, spec: TreeSpec, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        # Tokens to the right and to the left, |dz|·‖x‖ to the right and to the left, z - t, (z - t)²: [6, K·M].
        self.sums = torch.zeros(6, spec.trees * spec.nodes, dtype=torch.float64, device=device)
        # |phi'| summed and counted over path units with z > 0, then over the others.
        self.slopes = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, leaves: Tensor, decisions: Tensor, thresholds: Tensor | None) -> None:
        """Add N tokens' routes: z [N, K, D] of the deciding nodes on their paths, thresholds [K, M] (0 where None)."""
        slots, right, z = self._slots(leaves), self._right(leaves), decisions.double()
        if thresholds is not None:
            z = z - thresholds.double().flatten()[slots]
        for row, values in {0: right, 1: 1 - right, 4: z, 5: z * z}.items():
            self._add(row, slots, values)

    @torch.no_grad()
    def add_gradients(
        self,
        x: Tensor,
        gy: Tensor,
        w_out: Tensor,
        leaves: Tensor,
        responses: Tensor,
        node_backward: NodeBackward = "own",
    ) -> None:
        """Add the same tokens' inputs x [N, d] and output gradients gy [N, d] (see `node_gradients`)."""
        dz = node_gradients(gy, w_out, leaves, responses, self.spec, node_backward)
        push = dz.abs().double() * x.double().norm(dim=-1)[:, None, None]
        slots, right = self._slots(leaves), self._right(leaves)
        self._add(2, slots, right * push)
        self._add(3, slots, (1 - right) * push)
        if self.spec.placement == "unit":
            self._add_slopes(responses)

    def skew(self) -> NDArray[np.float64]:
        """Gradient skew [K, M]; NaN under 30 tokens a side, and for nodes without output."""
        right, left, g_right, g_left, _, _ = self._numpy()
        return metrics.gradient_skew(g_right, right, g_left, left)

    def offset(self) -> NDArray[np.float64]:
        """Router offset |mean(z - t)| / sd(z) [K, M]; NaN where under 30 tokens reach the node or z is constant."""
        right, left, _, _, total, squares = self._numpy()
        tokens = right + left
        n = np.maximum(tokens, 1)
        mean = total / n
        variance = squares / n - mean**2
        # What is left of a constant's variance after rounding is no spread.
        known = (tokens >= metrics.MIN_SIDE) & (variance > 1e-12 * squares / n)
        out = np.full(mean.shape, np.nan)
        out[known] = np.abs(mean[known]) / np.sqrt(variance[known])
        return out

    def path_asymmetry(self) -> float:
        """Gradient asymmetry G on the z that really occurred on paths, NaN for placements whose phi sees sums."""
        right, rights, left, lefts = self.slopes.tolist()
        if not (rights and lefts):
            return float("nan")
        a, b = right / rights, left / lefts
        return (a - b) / (a + b) if a + b > 0 else float("nan")

    def all_reduce(self) -> None:
        """Sum over the ranks of a distributed run."""
        sum_over_ranks(self.sums)
        sum_over_ranks(self.slopes)

    def _numpy(self) -> NDArray[np.float64]:
        return self.sums.cpu().numpy().reshape(6, self.spec.trees, self.spec.nodes)

    def _slots(self, leaves: Tensor) -> Tensor:
        trees = torch.arange(self.spec.trees, device=leaves.device)[:, None]
        return path_nodes(leaves, self.spec.depth) + trees * self.spec.nodes

    def _right(self, leaves: Tensor) -> Tensor:
        levels = torch.arange(self.spec.depth, device=leaves.device)
        return ((leaves.long()[..., None] >> (self.spec.depth - 1 - levels)) & 1).double()

    def _add(self, row: int, slots: Tensor, values: Tensor) -> None:
        self.sums[row] += torch.bincount(slots.flatten(), values.double().flatten(), self.sums.shape[1])

    def _add_slopes(self, responses: Tensor) -> None:
        spec = self.spec
        nodes, leaf = responses[..., : spec.depth], responses[..., spec.depth :]
        slope = torch.cat([node_slope(nodes, spec), phi_slope(leaf, spec.activation, spec.mirror, spec.leaf_gain)], -1)
        slope, right = slope.abs().double(), responses > 0
        added = [slope[right].sum(), right.sum().double(), slope[~right].sum(), (~right).sum().double()]
        self.slopes += torch.stack(added)


def row_norms(w_in: Tensor, w_out: Tensor, spec: TreeSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """L2 norms [K, M + L] of each position's rows of w_in and w_out (a leaf's W rows together); NaN without rows."""

    def positions(w: Tensor, nodes: int) -> NDArray[np.float64]:
        square = w.detach().double().square().sum(-1)
        leaf = square[:, nodes:].reshape(spec.trees, spec.leaves, spec.leaf_width).sum(-1)
        out: NDArray[np.float64] = torch.cat([square[:, :nodes], leaf], dim=1).sqrt().cpu().numpy()
        missing = np.full((spec.trees, spec.nodes - nodes), np.nan)
        return np.concatenate([missing, out], axis=1)

    return positions(w_in, spec.nodes), positions(w_out, spec.nodes if spec.node_output else 0)
