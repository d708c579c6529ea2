"""Dynamic sparsity made static: take the paths that no token takes out of a trained model, and say what that cost."""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

from ablate.balance.metrics import node_counts
from ablate.balance.nodes import row_norms
from ablate.balance.probe import UsageCounter
from ablate.config import ConfigError, Section
from ablate.kernels.spec import TreeSpec
from ablate.model.network import evaluating
from ablate.model.ragged import RaggedFeedForward, keep, replace_layer
from ablate.model.transformer import Transformer
from ablate.model.tree import TreeFeedForward

Counts = NDArray[np.int64]
Living = NDArray[np.bool_]

RANDOM_DRAWS = 3
TIMED_RUNS = 7


class Control(Section):
    """The same number of units removed for another reason."""

    units: int
    """Units left; within one path of the pruned model's."""
    bpb: list[float]
    """One a draw."""


class PruneReport(Section):
    """What pruning removed and what it cost; logits and bpb before and after are of one kernel route."""

    threshold: float
    """Share of a tree's tokens at or under which a subtree was removed."""
    tokens: int
    """Calibration tokens."""
    units_before: int
    units_after: int
    leaves_before: int
    leaves_after: int
    always_taken: int
    """Nodes kept for their output that no longer decide."""
    bytes_before: int
    """Of the whole model's tensors, as a checkpoint holds them."""
    bytes_after: int
    bpb_before: float
    bpb_after: float
    identical: bool
    """Whether every logit of the calibration tokens is the same bit for bit."""
    largest_change: float
    """Of a logit."""
    tokens_per_second_before: float
    """Of the complete layers on their own, faster route."""
    tokens_per_second_after: float
    controls: dict[str, Control]
    """random, and smallest weight norm first."""
    layer_units: list[tuple[int, int]]
    """Units before and after, by layer."""


def threshold_share(text: str, leaves: int) -> float:
    """A threshold as typed: a share such as 0.001, or of the mean load, such as 0.01/L. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(/\s*L)?\s*", text)
    try:
        share = float(match[1]) / (leaves if match[2] else 1) if match else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ConfigError(f"threshold is {text!r}: a share from 0 to under 1 is expected, such as 0, 0.001 or 0.01/L")
    return share


def living_leaves(counts: Counts, share: float) -> Living:
    """Leaves [..., K, L] that stay: those under no subtree whose share of its tree's tokens is at or under `share`.

    Of two siblings that would both go, the fuller one stays (the left one if equal), so that no path loses its end.
    """
    levels = node_counts(counts)
    if not levels[0].all():
        raise ValueError("a tree saw no token: nothing can be said of its leaves")
    limit = share * levels[0]
    alive = np.ones_like(levels[0], dtype=bool)
    for level in levels[1:]:
        left, right = level[..., ::2], level[..., 1::2]
        stays = np.stack([(left > limit) | ((right <= limit) & (left >= right)), right > limit], axis=-1)
        stays[..., 1] |= (left <= limit) & (left < right)
        alive = (alive[..., None] & stays).reshape(level.shape)
    return alive


def units_left(living: Living, spec: TreeSpec) -> NDArray[np.int64]:
    """Units [...] that stay with these leaves, bool [..., L]: nodes with output above a living leaf, others where both
    sides live, and the leaves' units.
    """
    below = [level > 0 for level in node_counts(living.astype(np.int64))]
    total = below[-1].sum(-1) * spec.leaf_width
    for level in below[1:]:
        left, right = level[..., ::2], level[..., 1::2]
        total = total + ((left | right) if spec.node_output else (left & right)).sum(-1)
    return np.asarray(total, dtype=np.int64)


def control_leaves(order: NDArray[np.float64], wanted: NDArray[np.int64], spec: TreeSpec) -> Living:
    """Leaves [K, L] left when leaves go in ascending `order` [K, L] until each tree has `wanted` units [K] left.

    A leaf that would take a tree below its number is passed over, so a tree may keep a few units more.
    """
    living = np.ones(order.shape, dtype=bool)
    for tree, ranks in enumerate(order):
        below = [np.full(1 << level, 1 << (spec.depth - level)) for level in range(spec.depth + 1)]
        spare = int(units_left(living[tree], spec) - wanted[tree])
        for leaf in np.argsort(ranks, kind="stable"):
            lost = spec.leaf_width
            for level in range(spec.depth):
                side = leaf >> (spec.depth - level - 1)
                gone, sibling = below[level + 1][side] == 1, below[level + 1][side ^ 1]
                # With output a node goes with its last leaf, without it when one side is left.
                lost += gone and (sibling == 0 if spec.node_output else sibling > 0)
            if lost <= spare and below[0][0] > 1:
                living[tree, leaf] = False
                spare -= lost
                for level in range(spec.depth + 1):
                    below[level][leaf >> (spec.depth - level)] -= 1
    return living


@torch.no_grad()
def leaf_usage(model: nn.Module, batches: Sequence[Tensor]) -> Counts:
    """Leaf counts int64 [layers, K, L] over ids [B, T], of complete or pruned tree layers in the complete ones' leaves."""
    trees = [m for m in model.modules() if isinstance(m, TreeFeedForward | RaggedFeedForward)]
    spec, device = trees[0].spec, trees[0].w_in.device
    counter = UsageCounter(len(trees), spec.trees, spec.leaves, device)
    first = torch.arange(spec.trees, device=device) * spec.leaves
    with evaluating(model):
        for ids in batches:
            model(ids)
            for layer, tree in enumerate(trees):
                leaves = tree.last_leaves
                assert leaves is not None
                counter.add(layer, leaves if isinstance(tree, TreeFeedForward) else tree.origin[leaves.long()] - first)
    return counter.take()


def prune(model: Transformer, living: Living) -> Transformer:
    """A copy of the model whose tree layers keep the `living` leaves, bool [layers, K, L], only."""
    pruned = copy.deepcopy(model)
    for (name, tree), alive in zip(_tree_layers(pruned), living, strict=True):
        replace_layer(pruned, name, keep(tree, alive))
    return pruned


def prune_report(
    model: Transformer, batches: Sequence[Tensor], score: Callable[[Transformer], float], share: float, *, seed: int = 0
) -> tuple[Transformer, PruneReport]:
    """A pruned copy, by usage on calibration ids [B, T], beside controls that remove as many units.

    `score` gives bpb. Raises ConfigError for a model without complete tree layers. Usage, logits and bpb are taken on
    one kernel route, the ragged trees' with nothing removed and then with it removed, so that only pruning differs;
    speed is compared with the complete layers' own route.
    """
    model = copy.deepcopy(model)
    trees = [tree for _, tree in _tree_layers(model)]
    for tree in trees:
        tree.backend = "auto"
    spec = trees[0].spec
    whole = prune(model, np.ones((len(trees), spec.trees, spec.leaves), dtype=bool))
    living = living_leaves(leaf_usage(whole, batches), share)
    pruned = prune(model, living)
    identical, change = _compare(whole, pruned, batches)
    before, after = _tokens_per_second([model, pruned], batches[0])
    kept = [units_left(alive, spec) for alive in living]
    rng = np.random.default_rng(seed)
    leaf_norms = [np.hypot(*row_norms(t.w_in, t.w_out, spec))[:, spec.nodes :] for t in trees]
    orders = {
        "random": [[rng.random((spec.trees, spec.leaves)) for _ in trees] for _ in range(RANDOM_DRAWS)],
        "smallest_norm": [leaf_norms],
    }
    controls = {}
    for name, draws in orders.items():
        masks = [np.stack([control_leaves(o, k, spec) for o, k in zip(d, kept, strict=True)]) for d in draws]
        left = int(units_left(masks[0], spec).sum())
        controls[name] = Control(units=left, bpb=[score(prune(model, mask)) for mask in masks])
    ragged = [layer for layer in pruned.modules() if isinstance(layer, RaggedFeedForward)]
    report = PruneReport(
        threshold=share,
        tokens=sum(ids.numel() for ids in batches),
        units_before=sum(t.tree.total_units for t in trees),
        units_after=sum(r.total_units for r in ragged),
        leaves_before=living.size,
        leaves_after=int(living.sum()),
        always_taken=sum(int((r.branches[:, 0] == r.branches[:, 1]).sum()) for r in ragged),
        bytes_before=_bytes(model),
        bytes_after=_bytes(pruned),
        bpb_before=score(whole),
        bpb_after=score(pruned),
        identical=identical,
        largest_change=change,
        tokens_per_second_before=before,
        tokens_per_second_after=after,
        controls=controls,
        layer_units=[(t.tree.total_units, r.total_units) for t, r in zip(trees, ragged, strict=True)],
    )
    return pruned, report


def report_table(report: PruneReport) -> Table:
    """The report for the terminal: before, after, and the two controls."""
    table = Table(title=f"Pruned at a share of {report.threshold:g} of {report.tokens:,} tokens", title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = (
        ("units", report.units_before, report.units_after),
        ("leaves", report.leaves_before, report.leaves_after),
        ("bytes", report.bytes_before, report.bytes_after),
        ("tokens/s", round(report.tokens_per_second_before), round(report.tokens_per_second_after)),
    )
    for name, old, new in rows:
        table.add_row(name, f"{old:,}", f"{new:,}", f"{100 * (new - old) / max(1, old):+.1f}%")
    base = report.bpb_before
    table.add_row("bpb", f"{base:.4f}", f"{report.bpb_after:.4f}", f"{report.bpb_after - base:+.4f}")
    for name, control in report.controls.items():
        mean = statistics.fmean(control.bpb)
        label = f"bpb, {name.replace('_', ' ')}" + (f" (mean of {len(control.bpb)})" if len(control.bpb) > 1 else "")
        table.add_row(label, f"{base:.4f}", f"{mean:.4f}", f"{mean - base:+.4f}")
    same = "the same bit for bit" if report.identical else f"up to {report.largest_change:.2g} apart"
    table.caption = f"Logits on these tokens: {same}. {report.always_taken} nodes are now always taken."
    return table


def _tree_layers(model: nn.Module) -> list[tuple[str, TreeFeedForward]]:
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, TreeFeedForward)]
    if not layers:
        raise ConfigError("the model has no complete tree layer: it is dense, or was pruned before")
    return layers


@torch.no_grad()
def _compare(before: nn.Module, after: nn.Module, batches: Sequence[Tensor]) -> tuple[bool, float]:
    """Whether all logits are equal, and their largest difference."""
    same, largest = True, 0.0
    with evaluating(before), evaluating(after):
        for ids in batches:
            a, b = before(ids), after(ids)
            same &= torch.equal(a, b)
            largest = max(largest, float((a - b).abs().max()))
    return same, largest


@torch.no_grad()
def _tokens_per_second(models: Sequence[nn.Module], ids: Tensor) -> list[float]:
    """Forward speed of each model, medians of runs taken in turn."""
    seconds: list[list[float]] = [[] for _ in models]
    for run in range(TIMED_RUNS + 1):
        for model, times in zip(models, seconds, strict=True):
            with evaluating(model):
                started = time.perf_counter()
                model(ids)
                if ids.device.type == "cuda":
                    torch.cuda.synchronize()
                if run:  # the first warms up
                    times.append(time.perf_counter() - started)
    return [ids.numel() / statistics.median(times) for times in seconds]


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
