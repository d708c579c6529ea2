"""Watches tree layers while a model trains and is evaluated: leaf counts from the routes each forward already computed.

The training loop's evaluator drives it (training/callbacks.py). Counts never cost a second forward pass. Gradients,
flips and the ceiling are measured at evaluations on the probe tokens: the first of the held-out slice, always the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ablate.balance import metrics
from ablate.balance.nodes import NodeSums, row_norms
from ablate.balance.usage import rows, tree_rows
from ablate.distributed import rank, sum_over_ranks, world_size
from ablate.model.network import evaluating
from ablate.model.tree import TreeFeedForward

MIN_PROBE = 8192
"""Probe tokens, or 128·L where that is more, so that the ceiling is measured on 64·L."""
MAX_KEPT = 1 << 29
"""Most floats of layer inputs (layers x tokens x d) kept for the ceiling; a model beyond it gets none."""
BATCH = 2048
"""Probe tokens run at a time."""
DENSE_NODES = 32
"""Nodes per level of a tree up to which one product for all beats gathering each token's rows."""

Loss = Callable[[nn.Module, Tensor], Tensor]
"""Mean loss of a model on a batch of inputs: what a probe takes gradients of."""
Labels = Callable[[Tensor], Tensor | None]
"""A whole number for each token [N] that the inputs give to a layer: what routing may tell apart; None where there is none."""

# Names beside metrics.summary with the side on which they are bad, where there is one.
_WORST = {"flip_rate": np.nanmax, "router_offset": np.nanmax, "informativeness": np.nanmin, "ceiling": np.nanmin}


class UsageCounter:
    """Streaming leaf counts int64 [layers, K, L]."""

    def __init__(self, layers: int, trees: int, leaves: int, device: torch.device | str = "cpu") -> None:
        self._shape = (layers, trees, leaves)
        self._counts = torch.zeros(layers, trees * leaves, dtype=torch.int64, device=device)
        self._offsets = torch.arange(trees, device=device) * leaves

    def add(self, layer: int, leaves: Tensor) -> None:
        """Count leaf indices int [N, K] of one layer."""
        slots = (leaves + self._offsets).flatten()
        counts = self._counts[layer]
        if counts.device.type == "cpu":
            counts += torch.bincount(slots, minlength=counts.numel())
        else:  # bincount would wait for the device; adding integers in any order gives the same sum
            counts.scatter_add_(0, slots, torch.ones_like(slots))

    def total(self) -> Tensor:
        """The counts so far, summed over ranks, on the CPU."""
        total = self._counts.clone()
        sum_over_ranks(total)
        return total.cpu().view(self._shape)

    def take(self) -> NDArray[np.int64]:
        """Return the counts summed over ranks, and start again from zero."""
        total: NDArray[np.int64] = self.total().numpy()
        self._counts.zero_()
        return total

    def put(self, total: Tensor) -> None:
        """Go on from counts [layers, K, L] of an interrupted run, which one rank takes over for all."""
        self._counts.copy_(total.view_as(self._counts)) if rank() == 0 else self._counts.zero_()


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What the P probe tokens showed at one evaluation; NaN where nothing can be said."""

    leaves: NDArray[np.int16]
    """[layers, K, P]."""
    labels: NDArray[np.int64] | None
    """[P]: ids of text, classes of facts; None where inputs have no name."""
    skew: NDArray[np.float64]
    """[layers, K, M]."""
    offset: NDArray[np.float64]
    """[layers, K, M]."""
    ceiling: NDArray[np.float64]
    """[layers, K]."""
    path_asymmetry: NDArray[np.float64]
    """[layers]."""


class Probe:
    """Counts and measures the tree layers of one model, all of one shape.

    In a distributed run counts, skew and offset are those of all ranks; flips, informativeness and the ceiling are
    those of each rank's own share of the probe tokens.

    Args:
        loss: mean loss on inputs; that of next tokens where not given.
        labels: names of the tokens in inputs; of all ids but the last of each row where not given.
    """

    def __init__(self, loss: Loss | None = None, labels: Labels | None = None) -> None:
        self._loss, self._labels = loss or next_token_loss, labels or previous_tokens
        self._trees: list[TreeFeedForward] = []
        self._model: nn.Module | None = None
        self._ids: list[Tensor] = []
        self._rows: list[int] = []  # tokens that each of these gave to a layer
        self._collecting = True
        self._previous: NDArray[np.int16] | None = None
        self._counts = self._train_counts = np.zeros((0, 1, 1), dtype=np.int64)

    def attach(self, model: nn.Module) -> None:
        """Watch the tree layers of `model`, first layer first."""
        self._model = model
        self._trees = [m for m in model.modules() if isinstance(m, TreeFeedForward)]
        if self._trees:
            spec, device = self._trees[0].spec, self._trees[0].w_in.device
            self._train = UsageCounter(len(self._trees), spec.trees, spec.leaves, device)
            self._held_out = UsageCounter(len(self._trees), spec.trees, spec.leaves, device)

    def watch_training(self) -> None:
        """Add the leaves of the training micro-batch that was just run."""
        for layer, tree in enumerate(self._trees):
            self._train.add(layer, _last_leaves(tree))

    @contextmanager
    def held_out(self) -> Iterator[None]:
        """One evaluation: `watch` counts in it, and the probe tokens are measured at its end."""
        if self._trees:
            self._train_counts = self._train.take()
        yield
        if self._trees:
            self._collecting = False
            self._counts = self._held_out.take()
            self._result = self._measure()
            self._tree_metrics = self._compare()

    def watch(self, inputs: Tensor) -> None:
        """Add the leaves of the held-out batch that was just run."""
        for layer, tree in enumerate(self._trees):
            self._held_out.add(layer, _last_leaves(tree))
        if self._trees and self._collecting and sum(self._rows) < self._wanted():
            self._ids.append(inputs.cpu())
            self._rows.append(_last_leaves(self._trees[0]).shape[0])

    def counts(self) -> NDArray[np.int64]:
        """Held-out leaf counts [layers, K, L] of the last evaluation, summed over ranks."""
        return self._counts

    def summary(self) -> dict[str, float]:
        """The last evaluation as named numbers: `metrics.summary` and what the probe tokens add; unknown ones left out.

        `flip_rate` is against the evaluation before; `grad_skew` (signed: above 0, gradients to the right are larger)
        and `router_offset` are means over the nodes known, weighted by traffic; `in_norm_dead` and `in_norm_alive` mean
        norms of leaves' w_in rows; `path_asymmetry` is G on the z that occurred.
        """
        out = metrics.summary(self._counts)
        for name, known in self._tree_metrics.items():
            values = np.where(np.isfinite(known), known, np.nan)
            if np.isfinite(values).any():
                out[name] = float(np.nanmean(values))
                if name in _WORST:
                    out[f"{name}_worst"] = float(_WORST[name](values))
                out |= {f"layer{i}/{name}": float(np.nanmean(v)) for i, v in enumerate(values) if np.isfinite(v).any()}
        return out

    def rows(self, step: int) -> pl.DataFrame:
        """The last evaluation's part of the usage table; training rows only where steps were taken."""
        result = self._result
        norms = {name: self._norms[i] for i, name in enumerate(("in_norm", "out_norm"))}
        frames = [rows(step, "held_out", self._counts, skew=result.skew, offset=result.offset, **norms)]
        if self._train_counts.any():
            frames.append(rows(step, "train", self._train_counts))
        return pl.concat(frames)

    def tree_rows(self, step: int) -> pl.DataFrame:
        """The last evaluation's part of the tree table (saturation is filled in at the end)."""
        return tree_rows(step, self._tree_metrics)

    @property
    def leaves(self) -> NDArray[np.int16]:
        """Probe tokens' leaves int16 [layers, K, P] at the last evaluation."""
        return self._result.leaves

    @property
    def ids(self) -> list[Tensor]:
        """The probe's batches of inputs, from the first evaluation on."""
        return self._ids

    def training_counts(self) -> Tensor | None:
        """Leaf counts int64 [layers, K, L] since the last evaluation, for a checkpoint; None without trees."""
        return self._train.total() if self._trees else None

    def resume(self, leaves: NDArray[np.int16] | None, training_counts: Tensor | None) -> None:
        """Go on from an interrupted run: the leaves of its last evaluation and the counts since then."""
        self._previous = leaves
        if self._trees and training_counts is not None:
            self._train.put(training_counts)

    def _wanted(self) -> int:
        """Probe tokens of this rank."""
        return -(-max(MIN_PROBE, 128 * self._trees[0].spec.leaves) // world_size())

    def _measure(self) -> ProbeResult:
        assert self._model is not None
        spec, layers = self._trees[0].spec, len(self._trees)
        self._norms = tuple(
            np.stack(n) for n in zip(*(row_norms(t.w_in, t.w_out, spec) for t in self._trees), strict=True)
        )
        sums = [NodeSums(spec, tree.w_in.device) for tree in self._trees]
        leaves: list[list[Tensor]] = [[] for _ in self._trees]
        inputs: list[list[Tensor]] = [[] for _ in self._trees]
        labels = [self._labels(ids) for ids in self._ids]
        tokens = sum(n if names is None else names.numel() for names, n in zip(labels, self._rows, strict=True))
        ceilings = tokens >= 64 * spec.leaves and layers * tokens * self._trees[0].w_in.shape[-1] <= MAX_KEPT
        for ids, size in zip(self._ids, self._rows, strict=True):
            for part in torch.split(ids, max(1, BATCH * ids.shape[0] // size)):
                for layer, seen in enumerate(look(self._model, self._trees, part, self._loss)):
                    seen.add_to(sums[layer])
                    leaves[layer].append(seen.leaves.to("cpu", torch.int16))
                    if ceilings:
                        inputs[layer].append(seen.x.cpu())
        for s in sums:
            s.all_reduce()
        unknown = np.full(spec.trees, np.nan)
        kept = zip(inputs, self._trees, strict=True)
        return ProbeResult(
            leaves=np.stack([torch.cat(parts).T.contiguous().numpy() for parts in leaves]),
            labels=torch.cat(named).numpy()
            if len(named := [n for n in labels if n is not None]) == len(labels)
            else None,
            skew=np.stack([s.skew() for s in sums]),
            offset=np.stack([s.offset() for s in sums]),
            ceiling=np.stack([tree_ceilings(torch.cat(x), tree) if ceilings else unknown for x, tree in kept]),
            path_asymmetry=np.array([s.path_asymmetry() for s in sums]),
        )

    def _compare(self) -> dict[str, NDArray[np.float64]]:
        """What is known of each tree beside its counts, [layers, K]."""
        result, shape = self._result, self._counts.shape[:2]
        unknown = np.full(shape, np.nan)
        found = (
            metrics.Informativeness(unknown, unknown)
            if result.labels is None
            else metrics.informativeness(result.leaves, result.labels, np.random.default_rng(0))
        )
        traffic = (
            np.concatenate(metrics.node_counts(self._counts)[:-1], axis=-1, dtype=np.float64)
            if (self._counts.shape[-1] > 1)
            else np.zeros((*shape, 0))
        )
        leaf_norm, gone = self._norms[0][..., -self._counts.shape[-1] :], metrics.dead(self._counts)
        before, self._previous = self._previous, result.leaves
        return {
            "flip_rate": unknown if before is None else metrics.flip_rate(before, result.leaves),
            "informativeness": found.observed,
            "informativeness_shuffled": found.shuffled,
            "ceiling": result.ceiling,
            "path_asymmetry": np.repeat(result.path_asymmetry[:, None], shape[1], axis=1),
            "grad_skew": weighted_mean(result.skew, traffic),
            "router_offset": weighted_mean(result.offset, traffic),
            "in_norm_dead": weighted_mean(leaf_norm, gone),
            "in_norm_alive": weighted_mean(leaf_norm, ~gone),
        }


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One layer's part in a forward and backward pass over N tokens."""

    tree: TreeFeedForward
    x: Tensor
    """[N, d], detached."""
    gy: Tensor
    """[N, d]: the loss's gradient at the layer's output."""
    leaves: Tensor
    responses: Tensor
    decisions: Tensor
    """[N, K, D]: z of the nodes that decided."""
    thresholds: Tensor | None

    def add_to(self, sums: NodeSums) -> None:
        """Add these tokens to a layer's sums."""
        sums.add(self.leaves, self.decisions, self.thresholds)
        if self.tree.spec.node_output:
            w_out, node_backward = self.tree.w_out.detach(), self.tree.tree.node_backward
            sums.add_gradients(self.x, self.gy, w_out, self.leaves, self.responses, node_backward)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean next-token loss (nats) of ids [B, T + 1]."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1))


def previous_tokens(ids: Tensor) -> Tensor:
    """Return the ids that a next-token model reads of ids [B, T + 1]."""
    return ids[:, :-1].reshape(-1)


def look(model: nn.Module, trees: list[TreeFeedForward], inputs: Tensor, loss: Loss = next_token_loss) -> list[Seen]:
    """What each tree layer saw and which gradient came back, for a loss on inputs, in eval mode.

    Nothing is accumulated in parameters: the backward pass goes to the layers' outputs only.
    """
    taken: list[dict[str, Tensor | None]] = []
    outputs: list[Tensor] = []

    def hook(tree: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        assert isinstance(tree, TreeFeedForward)
        y = y if y.requires_grad else y.detach().requires_grad_()
        outputs.append(y)
        taken.append(
            {
                "x": args[0].detach().reshape(-1, y.shape[-1]),
                "leaves": tree.last_leaves,
                "responses": tree.last_responses,
                "decisions": tree.last_decisions,
                "thresholds": tree.last_thresholds,
            }
        )
        return y

    handles = [tree.register_forward_hook(hook) for tree in trees]
    try:
        with torch.enable_grad(), evaluating(model):
            value = loss(model, inputs.to(trees[0].w_in.device))
            grads = torch.autograd.grad(value, outputs)
    finally:
        for handle in handles:
            handle.remove()
    pairs = zip(trees, taken, grads, strict=True)
    return [Seen(tree=tree, gy=gy.reshape(-1, gy.shape[-1]), **kept) for tree, kept, gy in pairs]  # type: ignore[arg-type]


def tree_ceilings(x: Tensor, tree: TreeFeedForward) -> NDArray[np.float64]:
    """`metrics.ceiling` of each tree [K] for layer inputs x [N, d] in the order of the text; NaN where no node decides."""
    if tree.hash_keys is not None:
        return np.full(tree.spec.trees, np.nan)
    w, b = (None if t is None else t.detach().to(x.device) for t in tree.router())
    assert w is not None
    out = []
    for k in range(tree.spec.trees):
        bias = torch.zeros(tree.spec.nodes, dtype=w.dtype) if b is None else b[k]
        if tree.spec.nodes <= DENSE_NODES * tree.spec.depth:
            out.append(metrics.ceiling((x @ w[k].T + bias).double().numpy()))
        else:
            out.append(metrics.ceiling_by(functools.partial(_gathered, x, w[k], bias), len(x), tree.spec.depth))
    return np.array(out)


def _gathered(x: Tensor, w: Tensor, b: Tensor, nodes: NDArray[np.int64]) -> NDArray[np.float64]:
    """z [N] of one node a token."""
    parts = [
        (a * w[at]).sum(-1) + b[at]
        for a, at in zip(torch.split(x, 8192), torch.split(torch.from_numpy(nodes), 8192), strict=True)
    ]
    out: NDArray[np.float64] = torch.cat(parts).double().numpy()
    return out


def weighted_mean(values: NDArray[np.float64], weights: NDArray[np.generic]) -> NDArray[np.float64]:
    """Mean over the last axis of the values that are not NaN; NaN where their weights add up to 0."""
    w = np.where(np.isnan(values), 0.0, weights)
    total = w.sum(-1)
    out: NDArray[np.float64] = np.divide(
        (np.nan_to_num(values) * w).sum(-1), total, out=np.full(total.shape, np.nan), where=total > 0
    )
    return out


def _last_leaves(tree: TreeFeedForward) -> Tensor:
    if tree.last_leaves is None:
        raise RuntimeError("a tree layer was not run before its leaves were counted")
    return tree.last_leaves
