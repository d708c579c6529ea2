"""The key-value cache, and tree layers one token at a time, for inference.

Shapes: B rows, T new tokens of each, S positions a row has room for, H heads of width d / H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.backend import REFERENCE, choose, load
from ablate.model.tree import TreeFeedForward

STEP_TOKENS = 8
"""Up to so many tokens at once go down the trees one after another; more are worth sorting by leaf."""


class Cache:
    """Keys and values of the tokens that each of B rows has seen; rows may differ in length.

    Give it to `Transformer.forward` or `features`: the tokens [B, T] of that call are at positions lengths[r] … of
    row r and see what the row holds, and afterwards each row is T longer. Rows of unequal length are padded on the
    right, and `rewind` then forgets the padding. Valid as long as the weights stay as they are. Only for inference:
    nothing here has gradients.
    """

    def __init__(self, layers: int, rows: int, capacity: int, heads: int, width: int, like: Tensor) -> None:
        self.lengths = [0] * rows
        self.capacity = capacity
        # Zeros, not what was in memory: a masked NaN is still a NaN.
        self.keys = [like.new_zeros(rows, heads, capacity, width) for _ in range(layers)]
        self.values = [like.new_zeros(rows, heads, capacity, width) for _ in range(layers)]
        self.steps: list[TreeStep | None] = [None] * layers
        self.positions: Tensor | slice = slice(0, 0)
        self._mask: Tensor | None = None
        self._causal = False
        self._end = 0

    def begin(self, rows: int, time: int) -> None:
        """Place T new tokens of every row. Raises ValueError for another number of rows and for rows without room."""
        if rows != len(self.lengths):
            raise ValueError(f"{rows} rows of tokens for a cache of {len(self.lengths)} rows")
        low, high = min(self.lengths, default=0), max(self.lengths, default=0)
        self._end = high + time
        if self._end > self.capacity:
            raise ValueError(f"{time} more tokens after {high} do not fit a cache of {self.capacity} positions")
        self._mask, self._causal = None, False
        if low == high:
            self.positions = slice(low, self._end)
            self._causal = low == 0 and time > 1
            if self._causal or time == 1:
                return
        device = self.keys[0].device
        positions = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(time, device=device)
        if low != high:
            self.positions = positions
        # What lies beyond a row's own length is left over from padding; a query at position p never looks past p.
        self._mask = (torch.arange(self._end, device=device) <= positions[..., None])[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [B, H, T, d/H] of the new queries over old and new keys; k and v are kept."""
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(self.positions, slice):
            keys[:, :, self.positions], values[:, :, self.positions] = k, v
        else:
            rows = torch.arange(len(self.lengths), device=k.device)[:, None]
            keys[rows, :, self.positions], values[rows, :, self.positions] = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(
            q, keys[:, :, : self._end], values[:, :, : self._end], attn_mask=self._mask, is_causal=self._causal
        )

    def advance(self, time: int) -> None:
        """The tokens placed by `begin` have been through all layers."""
        self.lengths = [length + time for length in self.lengths]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first lengths[r] tokens of each row r. Raises ValueError for more than the row holds."""
        if len(lengths) != len(self.lengths) or any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot rewind rows of lengths {self.lengths} to {list(lengths)}")
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int], capacity: int) -> Cache:
        """A cache of copies of these rows (a row may come several times), with room for `capacity` positions."""
        heads, width = self.keys[0].shape[1], self.keys[0].shape[3]
        new = Cache(len(self.keys), len(rows), capacity, heads, width, self.keys[0])
        new.lengths = [self.lengths[r] for r in rows]
        new.steps = self.steps
        index, used = torch.tensor(list(rows), device=self.keys[0].device), max(new.lengths, default=0)
        for old, copy in ((self.keys, new.keys), (self.values, new.values)):
            for layer, tensor in enumerate(old):
                copy[layer][:, :, :used] = tensor[index, :, :used]
        return new


class TreeStep:
    """A tree layer for a few tokens at a time: the path's rows are read, and no others.

    Thresholds are computed once, here: with `router_input: centred` they need every node's row.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self._run = run

    def __call__(self, x: Tensor) -> Tensor:
        """Return y [..., d] of x [..., d]."""
        return self._run(x.reshape(-1, x.shape[-1])).view(x.shape)


def tree_step(tree: TreeFeedForward) -> TreeStep | None:
    """Return a step where the layer's backend has one; None elsewhere: the layer's own forward is used then."""
    w = tree.w_in
    chosen = choose(tree.backend, w.device, w.dtype)
    if chosen == REFERENCE or tree.hash_keys is not None:
        return None
    run = load(chosen).decoder(
        w, tree.b, tree.w_out, tree.effective_thresholds(), tree.router_w, tree.router_b, tree.spec
    )
    return None if run is None else TreeStep(run)
