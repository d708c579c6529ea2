"""`TreeFeedForward`: K binary trees in place of a transformer's MLP, with every routing setting around one kernel call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ablate.config import Tree, parse
from ablate.distributed import sum_over_ranks, whole
from ablate.kernels.activations import unit_gain
from ablate.kernels.op import check_input, route, tree_feedforward
from ablate.kernels.reference import path_nodes
from ablate.kernels.spec import TreeSpec, is_identity
from ablate.model import auxiliary_losses, init
from ablate.model.hashing import draw_keys, hash_leaves, turns
from ablate.model.routing import Rule, rules


def tree_spec(tree: Tree) -> TreeSpec:
    """The kernel's view of a tree's settings. Where phi is the identity the three placements are one model: `unit`."""
    node_mirror = tree.mirror_of_nodes
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
    router_w: Tensor | None
    router_b: Tensor | None
    hash_keys: Tensor | None

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
        frozen = self.tree.router in ("frozen", "separate")
        self.register_buffer("router_w", torch.zeros(k, m, d_model) if frozen else None)
        self.register_buffer("router_b", torch.zeros(k, m) if frozen and self.tree.bias else None)
        hashed = self.tree.router == "hash" and spec.depth > 0
        self.register_buffer("hash_keys", torch.zeros(k, d_model, dtype=torch.int64) if hashed else None)
        self._rules = rules(self.tree)
        for i, rule in enumerate(self._rules):
            self.register_buffer(f"_sums{i}", torch.zeros(rule.sums_shape(spec, d_model) or ()), persistent=False)
        self.calibrating = False
        self.last_leaves: Tensor | None = None
        self.last_responses: Tensor | None = None
        self.last_thresholds: Tensor | None = None
        self.last_decisions: Tensor | None = None  # z of the nodes that decided, [N, K, D]
        self.last_load_loss: Tensor | None = None
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Shape and settings, for `print(model)`."""
        return f"d_model={self.w_in.shape[-1]}, {self.tree!r}"

    @property
    def needs_calibration(self) -> bool:
        """Whether the initialisation or a running mean wants a batch of real tokens before the first use."""
        return self.tree.init in {"orthogonal", "median_split"} or self.tree.router_input == "centred"

    def reset_parameters(self) -> None:
        """Initialise again, as far as possible without data; `calibrate` does the rest."""
        init.uniform_(self.w_in, self.b, self.w_out, self.tree.active_units, self._generator)
        with torch.no_grad():
            if self.tree.init == "zero_bias" and self.b is not None:
                self.b.zero_()
            if self.tree.init == "orthogonal":
                mean = self.w_in.new_zeros(self.w_in.shape[-1])
                self.w_in[:, : self.spec.nodes] = self._orthogonal(mean)
            if self.tree.router == "separate" and self.router_w is not None:
                init.rows_(self.router_w, self.router_b, self._generator)
            if self.hash_keys is not None:
                self.hash_keys.copy_(draw_keys(self.hash_keys.shape, self._generator))
        self.freeze_router()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Finish an initialisation that looks at data, and set the input mean, from tokens x [..., d]."""
        check_input(x.to(self.w_in.dtype), self.w_in)
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
        """Y [..., d] of x [..., d], in x's dtype (autocast's where it is on); raises ValueError on another width or dtype."""
        check_input(x, self.w_in)
        if self.calibrating:
            self.calibrate(x)
        thresholds = self.effective_thresholds()
        leaves, decisions = self._route(x, thresholds)
        w_in, b = self._learning()
        y, taken, responses = tree_feedforward(
            x,
            w_in,
            b,
            self.w_out,
            self.spec,
            thresholds=thresholds,
            leaves=leaves,
            backend=self.backend,
            node_backward=self.tree.node_backward,
        )
        decisions = responses[..., : self.spec.depth] if decisions is None else decisions
        if not torch.compiler.is_exporting():  # an exported graph leaves nothing behind
            self.last_leaves, self.last_responses, self.last_thresholds = taken, responses, thresholds
            self.last_decisions = decisions
        if self.training:
            with torch.no_grad():
                flat = x.reshape(-1, x.shape[-1])
                for rule, sums in self.step_sums():
                    add_once(sums, rule.sums(self, flat, taken, decisions))
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: the last load loss without its graph, which cannot be copied."""
        loss = self.last_load_loss
        return self.__dict__ | {"last_load_loss": None if loss is None else loss.detach()}

    def _learning(self) -> tuple[Tensor, Tensor | None]:
        """Return w_in and b; with `router: fixed` no gradient reaches their node rows."""
        nodes = self.spec.nodes
        if self.tree.router != "fixed" or not nodes or not torch.is_grad_enabled():
            return self.w_in, self.b
        parts = [p if p is None else torch.cat([p[:, :nodes].detach(), p[:, nodes:]], 1) for p in (self.w_in, self.b)]
        assert parts[0] is not None
        return parts[0], parts[1]

    def effective_thresholds(self) -> Tensor | None:
        """t_n [K, M] of all settings together, None where every one of them is 0."""
        shifts = [rule.shift(self) for rule in self._rules] if self.spec.depth else []
        given = [shift for shift in shifts if shift is not None]
        return functools.reduce(torch.add, given) if given else None

    def router(self) -> tuple[Tensor, Tensor | None]:
        """Node rows [K, M, d] and biases [K, M] that decide: the weights' own, a frozen copy or separate ones."""
        if self.router_w is not None:
            return self.router_w, self.router_b
        w_in, b = self._learning()
        return w_in[:, : self.spec.nodes], None if b is None else b[:, : self.spec.nodes]

    @torch.no_grad()
    def finish_step(self, rate: float = 1.0) -> None:
        """Once per optimizer step: move thresholds (`routing: centred`) and the running input mean.

        `rate` is the learning-rate schedule's share of its peak. Counts are summed over micro-batches and ranks.
        """
        for rule, sums in self.step_sums():
            sum_over_ranks(sums)
            rule.step(self, sums, rate)
        self.forget_step()

    def forget_step(self) -> None:
        """Drop what the optimizer step under way has seen so far."""
        for _, sums in self.step_sums():
            sums.zero_()

    def step_sums(self) -> list[tuple[Rule, Tensor]]:
        """Return the rules, each with what it has added up in the optimizer step under way."""
        return [(rule, self.get_buffer(f"_sums{i}")) for i, rule in enumerate(self._rules)]

    def _route(self, x: Tensor, thresholds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return leaves [N, K] where the kernel does not decide, and responses [N, K, D] of nodes that are not its own.

        None stands for what the kernel decides or returns. It does not decide with a frozen router or a hash, nor in
        training with the auxiliary losses. A hash has no responses: they are 1 on the way right and -1 on the way left.
        """
        self.last_load_loss = None
        depth = self.spec.depth
        if depth == 0:
            return None, None
        if self.hash_keys is not None:
            leaves = hash_leaves(x.detach().reshape(-1, x.shape[-1]), self.hash_keys, depth)
            return leaves, turns(leaves, depth)
        w, b = self.router()
        if self.training and (self.region_leak or self.load_loss):
            z = auxiliary_losses.node_responses(x.reshape(-1, x.shape[-1]), w, b)
            margin = z if thresholds is None else z - thresholds
            leaves = auxiliary_losses.leaky_leaves(margin.detach(), depth, self.region_leak)
            if self.load_loss:
                self.last_load_loss = auxiliary_losses.load_loss(margin, leaves, depth)
            return leaves, None if self.router_w is None else z.detach().gather(2, path_nodes(leaves, depth))
        if self.router_w is None:
            return None, None
        return route(x, w, b, self.spec, thresholds=thresholds, backend=self.backend)

    def _orthogonal(self, mean: Tensor) -> Tensor:
        # A generator of its own: called before and after data is seen, it must draw the same directions.
        generator = torch.Generator().manual_seed(self._generator.initial_seed() ^ 0x0A7)
        return init.orthogonal_nodes(self.spec.trees, self.spec.depth, mean, generator)

    def freeze_router(self) -> None:
        """With `router: frozen`, decide by the present node weights from now on."""
        self.follow_nodes(1.0)

    @torch.no_grad()
    def follow_nodes(self, share: float) -> None:
        """With `router: frozen`, move the weights that decide by a share of the way to the nodes' present ones."""
        if self.tree.router != "frozen":
            return
        if self.router_w is not None:
            self.router_w.lerp_(whole(self.w_in)[:, : self.spec.nodes], share)
        if self.router_b is not None and self.b is not None:
            self.router_b.lerp_(whole(self.b)[:, : self.spec.nodes], share)


@torch.library.custom_op("ablate::add_once", mutates_args=("total",))
def add_once(total: Tensor, part: Tensor) -> None:
    """Add a part to a total, but not in a forward pass that activation checkpointing computes again."""
    if torch._C._current_graph_task_id() == -1:  # outside a backward pass
        total.add_(part)
