"""AdamW with the settings that change balance: what decays, which rows, and the learning rate of node rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ablate.config import Train
from ablate.model.tree import TreeFeedForward


class TreeAdamW(torch.optim.AdamW):
    """AdamW whose decay and node learning rate for tree weights follow `Train`; everything else is plain AdamW.

    Decay of tree weights is done here, decoupled as in AdamW (arXiv 1711.05101), so that rows can be left out of it.
    """

    def __init__(self, model: nn.Module, train: Train) -> None:
        trees = [m for m in model.modules() if isinstance(m, TreeFeedForward)]
        weights = [p for t in trees for p in (t.w_in, t.w_out)]
        apart = {id(p) for p in weights} | {id(t.b) for t in trees}
        decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in apart]
        kept = [p for p in model.parameters() if id(p) not in {id(q) for q in decayed + weights}]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": train.weight_decay},
            {"params": kept, "weight_decay": 0.0},
            {"params": weights, "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], lr=train.lr, betas=train.betas, fused=True)
        self._trees = trees
        self._decay = train.weight_decay if train.tree_decay is None else train.tree_decay
        self._active_only = train.decay_rows == "active"
        self._scale = train.node_lr_scale

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update: decay, then Adam; node rows move `node_lr_scale` times as far."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        before = [(rows, rows.clone()) for t in self._trees for rows in _node_rows(t)] if self._scale != 1.0 else []
        if self._decay:
            for tree in self._trees:
                # Node rows that no gradient ever reaches are frozen, so they must not shrink either.
                learns = tree.spec.node_output and tree.tree.router != "fixed"
                self._shrink(tree.w_in, first=0 if learns else tree.spec.nodes)
                self._shrink(tree.w_out, first=0)
        super().step()
        for rows, then in before:
            rows.lerp_(then, 1 - self._scale)
        return loss

    def _shrink(self, weight: Tensor, first: int) -> None:
        """Decoupled decay of the rows from `first` on of a tree weight [K, rows, d]."""
        kept = 1 - self.param_groups[0]["lr"] * self._decay
        rows = weight[:, first:]
        if self._active_only and weight.grad is not None:
            reached = (weight.grad[:, first:] != 0).any(-1, keepdim=True)
            rows.mul_(torch.where(reached, kept, 1.0))
        else:
            rows.mul_(kept)


def _node_rows(tree: TreeFeedForward) -> list[Tensor]:
    """Views of everything that belongs to a tree's nodes: rows of w_in and w_out, and biases."""
    nodes = tree.spec.nodes
    parts = [tree.w_in, *([tree.b] if tree.b is not None else []), *([tree.w_out] if tree.spec.node_output else [])]
    return [part[:, :nodes] for part in parts]
