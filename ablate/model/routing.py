"""What nodes compare their responses with, and what moves it: one class for each rule.

To add a rule: a subclass of `Rule`, its entry in `ROUTING` (or `ROUTER_INPUT`), and its name in `config.Tree`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ablate.config import Tree
from ablate.kernels.op import without_autocast
from ablate.kernels.reference import path_nodes
from ablate.kernels.spec import TreeSpec

CENTRING_RATE = 0.2
"""eta of `routing: centred`, times the learning-rate schedule."""
MIN_TOKENS = 4
"""Nodes that fewer tokens reached in a step keep their threshold."""
RUNNING = 0.1
"""Weight of the newest step in running means and deviations."""


class Nodes(Protocol):
    """What a rule reads and writes of a layer: rules have no state of their own."""

    spec: TreeSpec
    thresholds: Tensor
    """[K, M], 0 at first."""
    deviation: Tensor
    """[K, M]: running standard deviation of z; 0 until a node was reached."""
    input_mean: Tensor
    """[d]: running mean of the layer's input."""

    def router(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows [K, M, d] and biases [K, M] that decide."""
        ...


class Rule:
    """The rule that changes nothing: nodes compare their responses with 0 (`routing: sign`, `router_input: raw`).

    Thresholds of a layer are the sum of its rules' `shift`. In training `sums` of every micro-batch are added up over
    an optimizer step and over ranks, and `step` is called with the total.
    """

    def sums_shape(self, spec: TreeSpec, d_model: int) -> tuple[int, ...] | None:
        """Return the shape of what `sums` returns; None for a rule that needs to see no tokens."""
        return None

    def shift(self, nodes: Nodes) -> Tensor | None:
        """Return what this rule adds to the thresholds, [K, M]; None where that is 0."""
        return None

    def sums(self, nodes: Nodes, x: Tensor, leaves: Tensor, z: Tensor) -> Tensor:
        """Return sums over tokens x [N, d] that took `leaves` [N, K] by the responses z [N, K, D]."""
        raise NotImplementedError

    def step(self, nodes: Nodes, sums: Tensor, rate: float) -> None:
        """Move the layer's state once; `rate` is the learning-rate schedule's share of its peak."""
        raise NotImplementedError


class CentredNodes(Rule):
    """`routing: centred`: each threshold follows its node's balance, without a loss term."""

    def sums_shape(self, spec: TreeSpec, d_model: int) -> tuple[int, ...]:
        """Return [4, K, M]: tokens, tokens that went right, sum of z, sum of z²."""
        return 4, spec.trees, spec.nodes

    def shift(self, nodes: Nodes) -> Tensor:
        """Return the thresholds."""
        return nodes.thresholds

    def sums(self, nodes: Nodes, x: Tensor, leaves: Tensor, z: Tensor) -> Tensor:
        """Return the sums of `sums_shape`, for each node over the tokens that reached it."""
        sums: Tensor = node_sums(leaves, z.to(torch.promote_types(nodes.thresholds.dtype, torch.float32)))
        return sums

    def step(self, nodes: Nodes, sums: Tensor, rate: float) -> None:
        """Move each threshold towards the median of what its node saw, by a share of the responses' deviation."""
        tokens, rights, total, squares = sums
        reached = tokens >= MIN_TOKENS
        n = tokens.clamp(min=1)
        sd = (squares / n - (total / n).square()).clamp(min=0).sqrt()
        running = torch.where(nodes.deviation > 0, (1 - RUNNING) * nodes.deviation + RUNNING * sd, sd)
        nodes.deviation.copy_(torch.where(reached, running, nodes.deviation))
        move = CENTRING_RATE * rate * nodes.deviation * (rights / n - 0.5)
        nodes.thresholds.add_(torch.where(reached, move, torch.zeros_like(move)))


@torch.library.custom_op("ablate::node_sums", mutates_args=())
def node_sums(leaves: Tensor, z: Tensor) -> Tensor:
    """Return for each node, over the tokens that reached it: their number, those that went right, sums of z and z².

    `leaves` int32 [N, K], z [N, K, D], the result [4, K, M]. Sums repeat bit for bit and no device is waited for.
    """
    trees, depth = z.shape[1:]
    nodes = (1 << depth) - 1
    levels = torch.arange(depth, device=z.device)
    right = ((leaves.long()[..., None] >> (depth - 1 - levels)) & 1).to(z.dtype)
    first = torch.arange(trees, device=z.device)[:, None] * nodes
    slot = (path_nodes(leaves, depth) + first).flatten()
    values = [v.flatten() for v in (torch.ones_like(z), right, z, z * z)]
    if z.device.type == "cpu":
        rows = [torch.bincount(slot, v, trees * nodes) for v in values]
    else:  # bincount would wait for the device and add in any order; accumulating by index sorts first
        rows = [v.new_zeros(trees * nodes).index_put_((slot,), v, accumulate=True) for v in values]
    return torch.stack(rows).view(4, trees, nodes)


@node_sums.register_fake
def _(leaves, z):  # type: ignore[no-untyped-def]
    return z.new_empty(4, z.shape[1], (1 << z.shape[2]) - 1)


class CentredInput(Rule):
    """`router_input: centred`: nodes decide by x minus its running mean."""

    def sums_shape(self, spec: TreeSpec, d_model: int) -> tuple[int, ...]:
        """Return [d + 1]: sum of x, tokens."""
        return (d_model + 1,)

    def shift(self, nodes: Nodes) -> Tensor:
        """Return the nodes' responses to the mean."""
        with without_autocast(nodes.input_mean.device):  # a threshold that is rounded moves routes
            return nodes.router()[0].detach() @ nodes.input_mean

    def sums(self, nodes: Nodes, x: Tensor, leaves: Tensor, z: Tensor) -> Tensor:
        """Return the sums of `sums_shape`."""
        total = x.sum(0).to(nodes.input_mean.dtype)
        return torch.cat([total, total.new_full((1,), x.shape[0])])

    def step(self, nodes: Nodes, sums: Tensor, rate: float) -> None:
        """Move the running mean towards the step's; the rate plays no part."""
        tokens = sums[-1]
        moved = nodes.input_mean.lerp(sums[:-1] / tokens, RUNNING)
        nodes.input_mean.copy_(torch.where(tokens > 0, moved, nodes.input_mean))


ROUTING: dict[str, Rule] = {"sign": Rule(), "centred": CentredNodes()}
ROUTER_INPUT: dict[str, Rule] = {"raw": Rule(), "centred": CentredInput()}


def rules(tree: Tree) -> tuple[Rule, ...]:
    """Return the rules of a tree's settings that do something; without nodes `routing` has nothing to do."""
    found = (ROUTING[tree.routing] if tree.depth else Rule(), ROUTER_INPUT[tree.router_input])
    return tuple(rule for rule in found if type(rule) is not Rule)
