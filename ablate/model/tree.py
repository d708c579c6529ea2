"""`TreeFeedForward`: K binary trees in place of a transformer's MLP, with every routing setting around one kernel call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ablate.config import Tree, parse
from ablate.distributed import sum_over_ranks
from ablate.kernels.activations import unit_gain
from ablate.kernels.op import route, tree_feedforward
from ablate.kernels.reference import path_nodes
from ablate.kernels.spec import TreeSpec, is_identity
from ablate.model import auxiliary_losses, init

CENTRING_RATE = 0.2
"""eta of `routing: centred`, times the learning-rate schedule."""
MIN_TOKENS = 4
"""Nodes that fewer tokens reached in a step keep their threshold."""
RUNNING = 0.1
"""Weight of the newest step in running means and deviations."""


def tree_spec(tree: Tree) -> TreeSpec:
    """The kernel's view of a tree's settings. Where phi is the identity the three placements are one model: `unit`."""
    node_mirror = tree.mirror if tree.node_mirror is None else tree.node_mirror
    linear = is_identity(tree.activation, tree.mirror) and node_mirror == tree.mirror
    scaled = tree.gain == "unit"
    return TreeSpec(
        trees=tree.trees,
        depth=tree.depth,
        leaf_width=tree.leaf_width,
        node_output=tree.node_output,
        placement="unit" if linear else tree.placement,
        activation=tree.activation,
        mirror=tree.mirror,
        node_mirror=node_mirror,
        node_gain=unit_gain(tree.activation, node_mirror) if scaled else 1.0,
        leaf_gain=unit_gain(tree.activation, tree.mirror) if scaled else 1.0,
    )


class TreeFeedForward(nn.Module):
    """K binary trees of depth D over tokens x [..., d]; a token computes one root-to-leaf path in each tree.

    Give a `Tree`, or its fields as keywords: `TreeFeedForward(256, trees=4, depth=6, leaf_width=4)`. Raises ConfigError on
    settings that cannot be used. With `routing="centred"` or `router_input="centred"` call `finish_step()` after every
    optimizer step. After a call, `last_leaves` int32 [N, K] and `last_responses` [N, K, D + W] hold the taken paths.
    Sources: arXiv 2604.08565, 2311.10770 (node_output on), 2308.14711 (leaf blocks).
    """

    thresholds: Tensor
    deviation: Tensor
    input_mean: Tensor
    _seen: Tensor
    _inputs: Tensor
    router_w: Tensor | None
    router_b: Tensor | None

    def __init__(
        self,
        d_model: int,
        tree: Tree | None = None,
        *,
        backend: str = "auto",
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.tree = tree if tree is not None else parse(Tree, settings, where="tree")
        self.spec = spec = tree_spec(self.tree)
        self.backend: str = backend
        self.region_leak, self.load_loss = 0.0, False
        self._generator = generator if generator is not None else torch.Generator().manual_seed(torch.initial_seed())
        k, m = spec.trees, spec.nodes
        self.w_in = nn.Parameter(torch.empty(k, spec.in_rows, d_model))
        self.b = nn.Parameter(torch.empty(k, spec.in_rows)) if self.tree.bias else None
        self.w_out = nn.Parameter(torch.empty(k, spec.out_rows, d_model))
        self.register_buffer("thresholds", torch.zeros(k, m))
        self.register_buffer("deviation", torch.zeros(k, m))  # running sd of z; 0 until a node was reached
        self.register_buffer("input_mean", torch.zeros(d_model))
        frozen = self.tree.router == "frozen"
        self.register_buffer("router_w", torch.empty(k, m, d_model) if frozen else None)
        self.register_buffer("router_b", torch.empty(k, m) if frozen and self.tree.bias else None)
        # What one optimizer step saw, over its micro-batches: tokens, rights, sum z, sum z² of each node [4, K, M].
        self.register_buffer("_seen", torch.zeros(4, k, m), persistent=False)
        self.register_buffer("_inputs", torch.zeros(d_model + 1), persistent=False)
        self.calibrating = False
        self.last_leaves: Tensor | None = None
        self.last_responses: Tensor | None = None
        self.last_thresholds: Tensor | None = None
        self.last_decisions: Tensor | None = None  # z of the nodes that decided, [N, K, D]
        self.last_load_loss: Tensor | None = None
        self._router_z = torch.empty(0)  # a frozen router's node responses on the path, [N, K, D]
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Shape and settings, for `print(model)`."""
        return f"d_model={self.w_in.shape[-1]}, {self.tree!r}"

    @property
    def needs_calibration(self) -> bool:
        """Whether the initialisation or a running mean wants a batch of real tokens before the first use."""
        return self.tree.init in {"orthogonal", "median_split"} or self.tree.router_input == "centred"

    def reset_parameters(self) -> None:
        """Initialise anew, as far as that goes without data; `calibrate` does the rest."""
        init.uniform_(self.w_in, self.b, self.w_out, self.tree.active_units, self._generator)
        with torch.no_grad():
            if self.tree.init == "zero_bias" and self.b is not None:
                self.b.zero_()
            if self.tree.init == "orthogonal":
                mean = self.w_in.new_zeros(self.w_in.shape[-1])
                self.w_in[:, : self.spec.nodes] = self._orthogonal(mean)
        self.freeze_router()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Finish an initialisation that looks at data, and set the input mean, from tokens x [..., d]."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.w_in.dtype)
        nodes = self.spec.nodes
        if self.tree.init == "orthogonal":
            self.w_in[:, :nodes] = self._orthogonal(x.mean(0))
        if self.tree.init == "median_split" and self.b is not None:
            self.b[:, :nodes] = init.median_bias(x, self.w_in[:, :nodes], self.spec.depth)
        if self.tree.router_input == "centred":
            self.input_mean.copy_(x.mean(0))
        self.freeze_router()

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., d] of x [..., d], in x's dtype (autocast's where it is on)."""
        if self.calibrating:
            self.calibrate(x)
        thresholds = self.effective_thresholds()
        leaves = self._given_leaves(x, thresholds)
        y, taken, responses = tree_feedforward(
            x,
            self.w_in,
            self.b,
            self.w_out,
            self.spec,
            thresholds=thresholds,
            leaves=leaves,
            backend=self.backend,
            node_backward=self.tree.node_backward,
        )
        self.last_leaves, self.last_responses, self.last_thresholds = taken, responses, thresholds
        tied = self.router_w is None or self.spec.depth == 0
        self.last_decisions = responses[..., : self.spec.depth] if tied else self._router_z
        if self.training and not _recomputing():
            self._observe(x, taken, responses)
        return y

    def effective_thresholds(self) -> Tensor | None:
        """t_n [K, M] of all settings together, None where every one of them is 0."""
        if self.spec.depth == 0 or (self.tree.routing == "sign" and self.tree.router_input == "raw"):
            return None
        if self.tree.router_input == "raw":
            return self.thresholds
        w = self.router_w if self.router_w is not None else self.w_in.detach()[:, : self.spec.nodes]
        return self.thresholds + w @ self.input_mean

    def router(self) -> tuple[Tensor, Tensor | None]:
        """Node rows [K, M, d] and biases [K, M] that decide: the weights' own, or the frozen copy."""
        if self.router_w is not None:
            return self.router_w, self.router_b
        return self.w_in[:, : self.spec.nodes], None if self.b is None else self.b[:, : self.spec.nodes]

    @torch.no_grad()
    def finish_step(self, rate: float = 1.0) -> None:
        """Once per optimizer step: move thresholds (`routing: centred`) and the running input mean.

        `rate` is the learning-rate schedule's share of its peak. Counts are summed over micro-batches and ranks.
        """
        sum_over_ranks(self._seen)
        sum_over_ranks(self._inputs)
        if self.tree.routing == "centred":
            tokens, rights, total, squares = self._seen
            reached = tokens >= MIN_TOKENS
            n = tokens.clamp(min=1)
            sd = (squares / n - (total / n).square()).clamp(min=0).sqrt()
            running = torch.where(self.deviation > 0, (1 - RUNNING) * self.deviation + RUNNING * sd, sd)
            self.deviation.copy_(torch.where(reached, running, self.deviation))
            move = CENTRING_RATE * rate * self.deviation * (rights / n - 0.5)
            self.thresholds.add_(torch.where(reached, move, torch.zeros_like(move)))
        if self.tree.router_input == "centred" and self._inputs[-1] > 0:
            self.input_mean.lerp_(self._inputs[:-1] / self._inputs[-1], RUNNING)
        self.forget_step()

    def forget_step(self) -> None:
        """Drop what the optimizer step under way has seen so far."""
        self._seen.zero_()
        self._inputs.zero_()

    def _given_leaves(self, x: Tensor, thresholds: Tensor | None) -> Tensor | None:
        """Leaves decided apart from the kernel: by the frozen router, or for the reference arms; None otherwise."""
        if self.spec.depth == 0:
            return None
        w, b = self.router()
        self.last_load_loss = None
        if self.training and (self.region_leak or self.load_loss):
            z = auxiliary_losses.node_responses(x.reshape(-1, x.shape[-1]), w, b, thresholds)
            leaves = auxiliary_losses.leaky_leaves(z.detach(), self.spec.depth, self.region_leak)
            if self.load_loss:
                self.last_load_loss = auxiliary_losses.load_loss(z, leaves, self.spec.depth)
            return leaves
        if self.router_w is None:
            return None
        leaves, self._router_z = route(x, w, b, self.spec, thresholds=thresholds, backend=self.backend)
        return leaves

    @torch.no_grad()
    def _observe(self, x: Tensor, leaves: Tensor, responses: Tensor) -> None:
        """Add one micro-batch to what this optimizer step saw, for the settings that need it."""
        if self.tree.router_input == "centred":
            self._inputs[:-1] += x.detach().reshape(-1, x.shape[-1]).sum(0)
            self._inputs[-1] += leaves.shape[0]
        if self.tree.routing != "centred" or self.spec.depth == 0:
            return
        frozen = self.router_w is not None
        z = (self._router_z if frozen else responses[..., : self.spec.depth]).to(self._seen.dtype)
        nodes = path_nodes(leaves, self.spec.depth)
        levels = torch.arange(self.spec.depth, device=leaves.device)
        right = ((leaves.long()[..., None] >> (self.spec.depth - 1 - levels)) & 1).to(z.dtype)
        slot = (nodes + torch.arange(self.spec.trees, device=nodes.device)[:, None] * self.spec.nodes).flatten()
        for row, values in enumerate((torch.ones_like(z), right, z, z * z)):
            self._seen[row].view(-1).add_(torch.bincount(slot, values.flatten(), self._seen[row].numel()))

    def _orthogonal(self, mean: Tensor) -> Tensor:
        # A generator of its own: called before and after data is seen, it must draw the same directions.
        generator = torch.Generator().manual_seed(self._generator.initial_seed() ^ 0x0A7)
        return init.orthogonal_nodes(self.spec.trees, self.spec.depth, mean, generator)

    def freeze_router(self) -> None:
        """With `router: frozen`, decide by the present node weights from now on."""
        if self.router_w is not None:
            self.router_w.copy_(self.w_in.detach()[:, : self.spec.nodes])
        if self.router_b is not None and self.b is not None:
            self.router_b.copy_(self.b.detach()[:, : self.spec.nodes])


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing computing it again."""
    return torch._C._current_graph_task_id() != -1
