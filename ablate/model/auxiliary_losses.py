"""Reference arms, not part of the answer without auxiliary losses: region leak and a load-balancing loss.

Both look at every node of a tree, so they are computed densely in plain PyTorch: they are yardsticks, not layers to ship.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.op import cast_to, compute_dtype, without_autocast


def node_responses(x: Tensor, w_nodes: Tensor, b: Tensor | None) -> Tensor:
    """Return z of every node, [N, K, M], for x [N, d], node rows w_nodes [K, M, d] and biases b [K, M]."""
    dtype = compute_dtype(x, w_nodes)
    with without_autocast(x.device):
        z = torch.einsum("nd,kmd->nkm", cast_to(dtype, x), cast_to(dtype, w_nodes))
        return z if b is None else z + b


def leaky_leaves(margin: Tensor, depth: int, leak: float) -> Tensor:
    """Return leaves int32 [N, K] of z - t [N, K, M] when each decision is turned round with chance `leak`.

    That is fastfeedforward's region leak.
    """
    goes_right = (margin > 0) ^ (torch.rand(margin.shape, device=margin.device) < leak)
    node = torch.zeros(margin.shape[:2], dtype=torch.int64, device=margin.device)
    for _ in range(depth):
        node = 2 * node + 1 + goes_right.gather(2, node[..., None]).squeeze(2)
    return (node - ((1 << depth) - 1)).int()


def load_loss(margin: Tensor, leaves: Tensor, depth: int) -> Tensor:
    """Return the Switch-style loss L · sum_l f_l P_l, mean over trees, of z - t [N, K, M] and leaves [N, K].

    It is 1 when leaves are used evenly (arXiv 2101.03961; on tree paths 2405.16836). f_l is the share of tokens
    routed to leaf l, P_l the mean probability of its path when each node were a sigmoid.
    """
    log_right, log_left = F.logsigmoid(margin), F.logsigmoid(-margin)
    path = margin.new_zeros(*margin.shape[:2], 1)
    for level in range(depth):
        here = slice((1 << level) - 1, (1 << (level + 1)) - 1)
        path = torch.stack([path + log_left[..., here], path + log_right[..., here]], dim=-1).flatten(2)
    taken = leaves.T.long()
    shares = taken.new_zeros(taken.shape[0], 1 << depth).scatter_add_(1, taken, torch.ones_like(taken))
    return (1 << depth) * (shares / leaves.shape[0] * path.exp().mean(0)).sum(1).mean()
