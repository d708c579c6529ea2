"""Leaves from a hash of the input: fixed routes that know nothing of distance (`router: hash`)."""

from __future__ import annotations

import torch
from torch import Tensor

ODD = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed number: spreads the bits of a sum upwards."""


def draw_keys(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return random int64 keys, one for each tree and direction."""
    return torch.randint(-(2**63), 2**63 - 1, tuple(shape), generator=generator, dtype=torch.int64)


def hash_leaves(x: Tensor, keys: Tensor, depth: int) -> Tensor:
    """Return leaves int32 [N, K] of x [N, d]: a hash of which of its numbers are above 0, by keys int64 [K, d]."""
    mixed = torch.stack([torch.where(x > 0, key, 0).sum(1) for key in keys], dim=1)  # sums wrap around
    mixed = (mixed ^ (mixed >> 32)) * ODD
    return ((mixed >> 40) & ((1 << depth) - 1)).int()


def turns(leaves: Tensor, depth: int) -> Tensor:
    """Return 1 for each turn right and -1 for each turn left on the way to leaves [N, K], root first: [N, K, D]."""
    levels = torch.arange(depth, device=leaves.device)
    return ((leaves.long()[..., None] >> (depth - 1 - levels)) & 1).float() * 2 - 1
