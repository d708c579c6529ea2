"""Reference arms, not part of the answer without auxiliary losses: region leak and a load-balancing loss.

Both look at every node of a tree, so they are computed densely in plain PyTorch: they are yardsticks, not layers to ship.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def node_responses(x: Tensor, w_nodes: Tensor, b: Tensor | None, thresholds: Tensor | None) -> Tensor:
    """z - t of every node, [N, K, M], for x [N, d] and node rows w_nodes [K, M, d]."""
    z = torch.einsum("nd,kmd->nkm", x, w_nodes)
    if b is not None:
        z = z + b[:, : w_nodes.shape[1]]
    return z if thresholds is None else z - thresholds


def leaky_leaves(z: Tensor, depth: int, leak: float) -> Tensor:
    """Leaves int32 [N, K] when each decision is turned round with chance `leak` (fastfeedforward's region leak)."""
    goes_right = (z > 0) ^ (torch.rand(z.shape, device=z.device) < leak)
    node = torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device)
    for _ in range(depth):
        node = 2 * node + 1 + goes_right.gather(2, node[..., None]).squeeze(2)
    return (node - ((1 << depth) - 1)).int()


def load_loss(z: Tensor, leaves: Tensor, depth: int) -> Tensor:
    """Switch-style loss L · sum_l f_l P_l, mean over trees (arXiv 2101.03961; on tree paths 2405.16836); 1 when uniform.

    f_l is the share of tokens routed to leaf l, P_l the mean probability of its path when each node were a sigmoid.
    """
    log_right, log_left = F.logsigmoid(z), F.logsigmoid(-z)
    path = z.new_zeros(*z.shape[:2], 1)
    for level in range(depth):
        here = slice((1 << level) - 1, (1 << (level + 1)) - 1)
        path = torch.stack([path + log_left[..., here], path + log_right[..., here]], dim=-1).flatten(2)
    shares = torch.stack([torch.bincount(leaves[:, k].long(), minlength=1 << depth) for k in range(leaves.shape[1])])
    return (1 << depth) * (shares / leaves.shape[0] * path.exp().mean(0)).sum(1).mean()
