"""Exact counts of parameters, units and arithmetic for one configuration, by formula: nothing is built."""

from __future__ import annotations

from ablate.config import Section, Trial


class Cost(Section):
    """What one configuration costs."""

    total_params: int
    active_params: int
    """Parameters that one token touches; the tied head touches every embedding row."""
    total_units: int
    """U of one block's feed-forward."""
    active_units: int
    """A of one block's feed-forward."""
    active_frac: float
    flops_per_token: int
    """Forward, multiply-adds x 2, mean over a full context's positions."""


def count(trial: Trial, vocab_size: int) -> Cost:
    """Parameters, units and FLOPs of a trial's model with `vocab_size` tokens."""
    model, tree, dense = trial.model, trial.tree, trial.dense
    d, blocks = model.d_model, model.blocks
    attention = 4 * d * d
    total = active = units = active_units = 0
    if model.feedforward == "tree":
        units, active_units = tree.total_units, tree.active_units
        rows_out = units if tree.node_output else tree.trees * tree.leaves * tree.leaf_width
        decided = tree.trees * (tree.depth + tree.leaf_width)  # rows of w_in on the path, contributing or not
        total = (units + rows_out) * d + units * tree.bias
        active = (decided + active_units) * d + decided * tree.bias
    elif model.feedforward == "dense":
        units = active_units = dense.width or 4 * d
        total = active = 2 * units * d + units * dense.bias
    elif model.feedforward == "moe":
        active_units = trial.moe.width or 4 * d
        units, routers = trial.moe.experts * active_units, trial.moe.experts * d
        total = 2 * units * d + units * trial.moe.bias + routers
        active = 2 * active_units * d + active_units * trial.moe.bias + routers
    norms = d * (2 if model.feedforward != "none" else 1)
    shared = vocab_size * d + d + blocks * (attention + norms)
    weights = blocks * (attention + (active - _biases(trial, active_units))) + vocab_size * d
    # q·k and the weighted sum of v, over half the context on average
    scores = blocks * 2 * d * (model.context + 1) // 2
    return Cost(
        total_params=shared + blocks * total,
        active_params=shared + blocks * active,
        total_units=units,
        active_units=active_units,
        active_frac=active_units / units if units else 0.0,
        flops_per_token=2 * (weights + scores),
    )


def _biases(trial: Trial, active_units: int) -> int:
    if trial.model.feedforward == "tree":
        return trial.tree.trees * (trial.tree.depth + trial.tree.leaf_width) * trial.tree.bias
    layer = {"dense": trial.dense, "moe": trial.moe}.get(trial.model.feedforward)
    return active_units * layer.bias if layer else 0
