"""Why nodes change sides: each node's change of z between two evaluations, split into router motion and drift.

On the same probe tokens a node's margin is z - t = <w, x> + b - t. Between two evaluations
    z' - z = [<w' - w, (x + x')/2> + (b' - b) - (t' - t)] + <(w + w')/2, x' - x>,
an identity: the first part is what the router moved, the second what the layers below moved its inputs. Nothing is left
over and neither part depends on which of the two is thought to have moved first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ablate.balance.usage import MOTION_SCHEMA
from ablate.kernels.reference import path_nodes
from ablate.model.network import evaluating
from ablate.model.tree import TreeFeedForward

GATHER_BUDGET = 1 << 22
"""Floats of gathered router rows in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One layer at one evaluation, on P probe tokens; float64, on the CPU."""

    x: Tensor
    """[P, d]: the layer's input."""
    leaves: Tensor
    """int64 [P, K]."""
    w: Tensor
    """[K, M, d]: the rows that decide."""
    shift: Tensor
    """[K, M]: b - t."""


@torch.no_grad()
def snapshots(model: nn.Module, batches: Sequence[Tensor]) -> list[Snapshot]:
    """The tree layers of a model, first layer first, on probe ids [B, T], in eval mode."""
    trees = [m for m in model.modules() if isinstance(m, TreeFeedForward)]
    inputs: list[list[Tensor]] = [[] for _ in trees]
    leaves: list[list[Tensor]] = [[] for _ in trees]

    def hook(tree: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        assert isinstance(tree, TreeFeedForward)
        assert tree.last_leaves is not None
        layer = next(i for i, t in enumerate(trees) if t is tree)
        inputs[layer].append(args[0].reshape(-1, args[0].shape[-1]).double().cpu())
        leaves[layer].append(tree.last_leaves.long().cpu())

    handles = [tree.register_forward_hook(hook) for tree in trees]
    try:
        with evaluating(model):
            for ids in batches:
                model(ids)
    finally:
        for handle in handles:
            handle.remove()
    out = []
    for tree, x, taken in zip(trees, inputs, leaves, strict=True):
        w, b = tree.router()
        t = tree.effective_thresholds()
        shift = torch.zeros(w.shape[:2], dtype=torch.float64)
        shift = shift if b is None else shift + b.double().cpu()
        shift = shift if t is None else shift - t.double().cpu()
        out.append(Snapshot(x=torch.cat(x), leaves=torch.cat(taken), w=w.detach().double().cpu().clone(), shift=shift))
    return out


def split(before: Snapshot, after: Snapshot) -> tuple[Tensor, Tensor, Tensor]:
    """z - t at the earlier evaluation, and the router's and the drift's part of its change: each float64 [P, K, D].

    For the nodes on each token's path at the earlier evaluation. The parts add up to the change exactly.
    """
    trees, nodes, d = before.w.shape
    depth = (nodes + 1).bit_length() - 1
    paths = path_nodes(before.leaves, depth)
    tree = torch.arange(trees)[:, None]
    chunk = max(1, GATHER_BUDGET // max(1, trees * depth * d))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(paths), chunk):
        here = slice(start, start + chunk)
        at, x, y = paths[here], before.x[here], after.x[here]
        w, v = before.w[tree, at], after.w[tree, at]
        margin = torch.einsum("nd,nkld->nkl", x, w) + before.shift[tree, at]
        router = torch.einsum("nd,nkld->nkl", (x + y) / 2, v - w) + (after.shift - before.shift)[tree, at]
        drift = torch.einsum("nd,nkld->nkl", y - x, (w + v) / 2)
        parts.append((margin, router, drift))
    margin, router, drift = (torch.cat(p) for p in zip(*parts, strict=True))
    return margin, router, drift


def motion(before: Sequence[Snapshot], after: Sequence[Snapshot], *, since: int, step: int) -> pl.DataFrame:
    """The split of every node that a probe token reached, rows of MOTION_SCHEMA, for the layers of one model."""
    frames = [pl.DataFrame(schema=MOTION_SCHEMA)]
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        trees, nodes, _ = old.w.shape
        if nodes == 0:
            continue
        depth = (nodes + 1).bit_length() - 1
        margin, router, drift = split(old, new)
        slots = (path_nodes(old.leaves, depth) + torch.arange(trees)[:, None] * nodes).flatten()
        tokens = torch.bincount(slots, minlength=trees * nodes)
        reached = torch.nonzero(tokens).flatten()
        mean = _NodeMeans(slots, tokens, reached)
        heap = (reached % nodes).numpy()
        level = np.floor(np.log2(heap + 1)).astype(np.int64)
        columns = {
            "step": np.full(len(heap), step),
            "since": np.full(len(heap), since),
            "layer": np.full(len(heap), layer),
            "tree": (reached // nodes).numpy(),
            "level": level,
            "index": heap + 1 - (1 << level),
            "tokens": tokens[reached].numpy(),
            "right": mean(margin > 0),
            "right_after": mean(margin + router + drift > 0),
            "sd": np.sqrt(np.maximum(mean(margin * margin) - mean(margin) ** 2, 0)),
            "change": mean(router + drift),
            "router": mean(router),
            "drift": mean(drift),
            "router_rms": np.sqrt(mean(router * router)),
            "drift_rms": np.sqrt(mean(drift * drift)),
        }
        frames.append(pl.DataFrame(columns, schema=MOTION_SCHEMA, strict=False))
    return pl.concat(frames)


@dataclass(frozen=True)
class _NodeMeans:
    """Means over the tokens of each node that was reached, of values [P, K, D] on the tokens' paths."""

    slots: Tensor
    tokens: Tensor
    reached: Tensor

    def __call__(self, values: Tensor) -> NDArray[np.float64]:
        sums = torch.bincount(self.slots, values.double().flatten(), len(self.tokens))
        out: NDArray[np.float64] = (sums[self.reached] / self.tokens[self.reached]).numpy()
        return out


class MotionRecorder:
    """Called at every evaluation; compares the model with itself at the one before."""

    def __init__(self) -> None:
        self._last: tuple[int, list[Snapshot]] | None = None

    def __call__(self, step: int, model: nn.Module, batches: Sequence[Tensor]) -> pl.DataFrame:
        """Rows of MOTION_SCHEMA since the call before, none at the first, on the same probe ids [B, T]."""
        now, last = snapshots(model, batches), self._last
        self._last = step, now
        return pl.DataFrame(schema=MOTION_SCHEMA) if last is None else motion(last[1], now, since=last[0], step=step)

    def state_dict(self) -> dict[str, Any]:
        """The last evaluation, as plain tensors, for a checkpoint."""
        if self._last is None:
            return {}
        step, layers = self._last
        return {"step": step, "layers": [vars(snapshot) for snapshot in layers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._last = (state["step"], [Snapshot(**layer) for layer in state["layers"]]) if state else None
