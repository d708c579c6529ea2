"""Named initialisations of a tree layer, in place; the ones that need data get the layer's own input tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ablate.config import ConfigError


def uniform_(w_in: Tensor, b: Tensor | None, w_out: Tensor, active_units: int, generator: torch.Generator) -> None:
    """w_in, b ~ U(±1/sqrt d), w_out ~ U(±1/sqrt A) (UltraFastBERT's ranges)."""
    rows_(w_in, b, generator)
    with torch.no_grad():
        w_out.uniform_(-1 / math.sqrt(active_units), 1 / math.sqrt(active_units), generator=generator)


@torch.no_grad()
def rows_(w_in: Tensor, b: Tensor | None, generator: torch.Generator) -> None:
    """Draw w_in and b from U(±1/sqrt d)."""
    bound = 1 / math.sqrt(w_in.shape[-1])
    w_in.uniform_(-bound, bound, generator=generator)
    if b is not None:
        b.uniform_(-bound, bound, generator=generator)


def orthogonal_nodes(trees: int, depth: int, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Node vectors [K, M, d], orthonormal along every root-to-leaf path, orthogonal to `mean` [d], times 1/sqrt 3.

    The factor is the expected norm of a `uniform` row. Raises ConfigError where d has no room for depth + 1 directions.
    """
    d = mean.shape[0]
    if depth + 1 > d:
        raise ConfigError(f"init 'orthogonal' at depth {depth} needs d_model of at least {depth + 1}, got {d}")
    norm = mean.norm()
    centre = (mean / norm if norm > 0 else mean).expand(trees, 1, 1, d)
    levels: list[Tensor] = []
    above = centre  # [K, nodes of the level, directions to avoid, d]
    for level in range(depth):
        v = torch.randn(trees, 1 << level, d, generator=generator, dtype=mean.dtype).to(mean.device)
        for _ in range(2):  # the second projection removes what rounding left of the first
            v = v - torch.einsum("knad,kna->knd", above, torch.einsum("knad,knd->kna", above, v))
            v = v / v.norm(dim=-1, keepdim=True)
        levels.append(v)
        above = torch.cat([above, v[:, :, None]], dim=2).repeat_interleave(2, dim=1)
    nodes = torch.cat(levels, dim=1) if levels else mean.new_zeros(trees, 0, d)
    return nodes / math.sqrt(3)


def median_bias(x: Tensor, w_nodes: Tensor, depth: int) -> Tensor:
    """Node biases [K, M] with which every node halves the tokens of x [N, d] that reach it, top down.

    Raises ConfigError with fewer than 64 tokens a leaf.
    """
    trees, nodes, _ = w_nodes.shape
    if x.shape[0] < 64 << depth:
        raise ConfigError(f"init 'median_split' at depth {depth} needs at least {64 << depth} tokens, got {x.shape[0]}")
    b = x.new_zeros(trees, nodes)
    for k in range(trees):
        z = x @ w_nodes[k].T
        at = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        for n in range(nodes):
            here = z[at == n, n]
            ordered = here.sort().values
            middle = ordered.numel() // 2
            b[k, n] = -(ordered[middle - 1] + ordered[middle]) / 2
            at = torch.where(at == n, 2 * n + 1 + (z[:, n] + b[k, n] > 0).long(), at)
    return b
