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


class LayerCost(Section):
    """What one feed-forward layer costs."""

    total_params: int
    active_params: int
    total_units: int
    active_units: int
    active_weights: int
    """Weights that one token multiplies, biases left out; with them those of a router apart from its nodes, which never learn."""


def count_layer(trial: Trial) -> LayerCost:
    """Parameters and units of one feed-forward layer of a trial; nothing of it where there is none."""
    tree, dense, d = trial.tree, trial.dense, trial.model.d_model
    total = active = units = active_units = biases = routing = 0
    if trial.model.feedforward == "tree":
        units, active_units = tree.total_units, tree.active_units
        rows_out = units if tree.node_output else tree.trees * tree.leaves * tree.leaf_width
        decided = tree.trees * (tree.depth + tree.leaf_width)  # rows of w_in on the path, contributing or not
        biases = decided * tree.bias
        # Nodes that contribute have responses of their own beside those of a router apart from them.
        routing = tree.trees * tree.depth * d if tree.router in ("frozen", "separate") and tree.node_output else 0
        total = (units + rows_out) * d + units * tree.bias
        active = (decided + active_units) * d + biases
    elif trial.model.feedforward == "dense":
        units = active_units = dense.width or 4 * d
        biases = units * dense.bias
        total = active = 2 * units * d + biases
    elif trial.model.feedforward == "moe":
        active_units = trial.moe.width or 4 * d
        units, routers = trial.moe.experts * active_units, trial.moe.experts * d
        biases = active_units * trial.moe.bias
        total = 2 * units * d + units * trial.moe.bias + routers
        active = 2 * active_units * d + biases + routers
    return LayerCost(
        total_params=total,
        active_params=active,
        total_units=units,
        active_units=active_units,
        active_weights=active - biases + routing,
    )


def cost_of(layer: LayerCost, *, layers: int, shared_params: int, flops_per_token: int) -> Cost:
    """Return the cost of a model of so many equal layers, and parameters that every token touches."""
    return Cost(
        total_params=shared_params + layers * layer.total_params,
        active_params=shared_params + layers * layer.active_params,
        total_units=layer.total_units,
        active_units=layer.active_units,
        active_frac=layer.active_units / layer.total_units if layer.total_units else 0.0,
        flops_per_token=flops_per_token,
    )


def count(trial: Trial, vocab_size: int) -> Cost:
    """Parameters, units and FLOPs of a trial's language model with `vocab_size` tokens."""
    model, layer = trial.model, count_layer(trial)
    d, blocks = model.d_model, model.blocks
    attention = 4 * d * d
    norms = d * (2 if model.feedforward != "none" else 1)
    weights = blocks * (attention + layer.active_weights) + vocab_size * d
    # q·k and the weighted sum of v, over half the context on average
    scores = blocks * 2 * d * (model.context + 1) // 2
    shared = vocab_size * d + d + blocks * (attention + norms)
    return cost_of(layer, layers=blocks, shared_params=shared, flops_per_token=2 * (weights + scores))
