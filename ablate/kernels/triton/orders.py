"""Orders of the tokens: sorted by the part of the tree they reach, and where each tile's run of them begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ablate.kernels.triton.tiling import Piece


@dataclass(frozen=True, slots=True)
class Order:
    """Tokens sorted by the first `levels` levels of their path, stably: perm int32 [K, N], keys (sorted) int32 [K, N].

    perm[k] is a permutation of the tokens, which is what every kernel's ownership argument rests on.
    """

    perm: Tensor
    keys: Tensor
    levels: int


def sort_tokens(codes: Tensor, levels: int) -> Order:
    """The order of tokens by codes int32 [N, K], the nodes they reach at level `levels` (0 leftmost), for each tree."""
    key = torch.int16 if levels < 16 else torch.int32  # short keys sort faster, and hold codes below 2^15
    keys, perm = torch.sort(codes.t().contiguous().to(key), dim=1, stable=True)
    return Order(perm.int(), keys.int(), levels)


def segments(order: Order | None, piece: Piece, depth: int, tokens: int, trees: int, device: torch.device) -> Tensor:
    """Where each tile's tokens begin in leaf order: int32 [K, tiles + 1], the last entry N (one if unsorted)."""
    if order is None:
        seg = torch.zeros((trees, 2), dtype=torch.int32, device=device)
        seg[:, 1] = tokens
        return seg
    level = piece.tiles.bit_length() - 1
    edges = torch.arange(piece.tiles + 1, dtype=torch.int32, device=device).repeat(trees, 1)
    return torch.searchsorted(order.keys >> (depth - level), edges, out_int32=True)


def splits(piece: Piece, tokens: int, d: int, trees: int, bd: int, split_tokens: int) -> int:
    """Into how many runs a weight gradient cuts each tile's tokens.

    Enough programs for two to a multiprocessor of a large GPU (264), no run under `split_tokens` on average. It is a
    function of the shape alone, so sums never change their order.
    """
    programs = piece.tiles * piece.chunks * -(-d // bd) * trees
    return max(1, min(-(-264 // programs), tokens // (piece.tiles * split_tokens), 32))
