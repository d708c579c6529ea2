"""Watches tree layers while a model is evaluated: leaf counts from the routes each forward already computed.

The training loop's evaluator drives it (training/callbacks.py); it never runs the model a second time for counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ablate.balance import metrics
from ablate.balance.usage import USAGE_SCHEMA
from ablate.model.tree import TreeFeedForward


class Probe:
    """Leaf counts [layers, K, L] of the tree layers of one model, all of one shape."""

    def __init__(self) -> None:
        self._trees: list[TreeFeedForward] = []
        self._counts = torch.zeros(0, dtype=torch.int64)

    def attach(self, model: nn.Module) -> None:
        """Watch the tree layers of `model`, first layer first."""
        self._trees = [m for m in model.modules() if isinstance(m, TreeFeedForward)]

    @contextmanager
    def held_out(self) -> Iterator[None]:
        """Start counting anew for one evaluation."""
        if self._trees:
            spec = self._trees[0].spec
            device = self._trees[0].w_in.device
            self._counts = torch.zeros(len(self._trees), spec.trees, spec.leaves, dtype=torch.int64, device=device)
        yield

    def watch(self, _tokens: Tensor) -> None:
        """Add the leaves of the batch that was just run."""
        for layer, tree in enumerate(self._trees):
            assert tree.last_leaves is not None
            offsets = torch.arange(tree.spec.trees, device=tree.last_leaves.device) * tree.spec.leaves
            slots = (tree.last_leaves.long() + offsets).flatten()
            self._counts[layer] += torch.bincount(slots, minlength=self._counts[layer].numel()).view_as(self._counts[layer])

    def counts(self) -> NDArray[np.int64]:
        """Leaf counts [layers, K, L] of this evaluation, summed over ranks."""
        counts = self._counts.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        return counts.cpu().numpy()

    def rows(self, step: int) -> pl.DataFrame:
        """This evaluation's part of the usage table: every node and leaf of every tree."""
        frames = []
        for level, count in enumerate(metrics.node_counts(self.counts())):
            layers, trees, width = count.shape
            grid = np.indices((layers, trees, width)).reshape(3, -1)
            frames.append(
                pl.DataFrame(
                    {
                        "step": np.full(count.size, step),
                        "layer": grid[0],
                        "tree": grid[1],
                        "level": np.full(count.size, level),
                        "index": grid[2],
                        "count": count.ravel(),
                    }
                )
            )
        rows = pl.concat(frames).with_columns(
            window=pl.lit("held_out"), **{c: pl.lit(None) for c in USAGE_SCHEMA if c not in frames[0].columns and c != "window"}
        )
        return rows.select(pl.col(name).cast(dtype) for name, dtype in USAGE_SCHEMA.items())

    def empty(self) -> pl.DataFrame:
        """The usage table of a model without trees."""
        return pl.DataFrame(schema=USAGE_SCHEMA)
