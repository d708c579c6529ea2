"""`RaggedFeedForward`: a tree layer after pruning. Loads, runs and can be fine-tuned like the layer it came from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ablate.config import ConfigError, Tree
from ablate.kernels.op import check_input
from ablate.kernels.ragged.op import ragged_feedforward, route
from ablate.kernels.ragged.shape import shape_of
from ablate.model.tree import TreeFeedForward, tree_spec


class RaggedFeedForward(nn.Module):
    """K ragged trees over tokens x [..., d]: the paths that were kept of a complete tree layer.

    Thresholds are what they were when it was pruned and no longer move. `last_leaves` int32 [N, K] numbers the leaves
    of all trees through; `origin` [leaves] holds tree·L + leaf of each in the complete layer. Raises ValueError where
    `roots` and `branches` describe no trees.
    """

    roots: Tensor
    branches: Tensor
    origin: Tensor
    thresholds: Tensor
    router_w: Tensor | None
    router_b: Tensor | None

    def __init__(
        self, d_model: int, tree: Tree, roots: Tensor, branches: Tensor, origin: Tensor, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.tree, self.spec, self.backend = tree, tree_spec(tree), backend
        self.shape = shape_of(roots.numpy(), branches.numpy(), tree.depth)
        nodes, leaves = len(branches), len(self.shape.lengths)
        if len(roots) != tree.trees or len(origin) != leaves:
            raise ValueError(f"{len(roots)} roots and {len(origin)} leaves: {tree.trees} and {leaves} are expected")
        rows = nodes + leaves * tree.leaf_width
        self.w_in = nn.Parameter(torch.zeros(rows, d_model))
        self.b = nn.Parameter(torch.zeros(rows)) if tree.bias else None
        self.w_out = nn.Parameter(torch.zeros(rows if tree.node_output else rows - nodes, d_model))
        self.register_buffer("roots", roots)
        self.register_buffer("branches", branches)
        self.register_buffer("origin", origin)
        self.register_buffer("thresholds", torch.zeros(nodes))
        frozen = tree.router in ("frozen", "separate")
        self.register_buffer("router_w", torch.zeros(nodes, d_model) if frozen else None)
        self.register_buffer("router_b", torch.zeros(nodes) if frozen and tree.bias else None)
        self.last_leaves: Tensor | None = None
        self.last_responses: Tensor | None = None

    def extra_repr(self) -> str:
        """Shape and settings, for `print(model)`."""
        return f"nodes={len(self.branches)}, leaves={len(self.origin)}, {self.tree!r}"

    @property
    def total_units(self) -> int:
        """Units kept: nodes and leaf units of all trees."""
        return int(self.w_in.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., d] of x [..., d]; raises ValueError on another width or dtype."""
        check_input(x, self.w_in)
        leaves = None
        if self.router_w is not None and len(self.branches):
            leaves, _ = route(
                x, self.router_w, self.router_b, self.thresholds, self.shape, self.spec, backend=self.backend
            )
        y, taken, responses = ragged_feedforward(
            x,
            self.w_in,
            self.b,
            self.w_out,
            self.thresholds,
            self.shape,
            self.spec,
            leaves=leaves,
            backend=self.backend,
        )
        if not torch.compiler.is_exporting():  # an exported graph leaves nothing behind
            self.last_leaves, self.last_responses = taken, responses
        return y


def keep(layer: TreeFeedForward, living: NDArray[np.bool_]) -> RaggedFeedForward:
    """The layer with only its `living` leaves, bool [K, L], at least one in each tree; weights are copied.

    A node with one living side is replaced by that side where nodes have no output, and always taken where they have:
    then it still adds its output. Tokens that took a removed path go to the side that is left.
    """
    if layer.hash_keys is not None:
        raise ConfigError("tree.router is 'hash': a hash knows no subtrees, so none can be removed")
    spec = layer.spec
    alive = np.asarray(living, dtype=bool)
    if alive.shape != (spec.trees, spec.leaves) or not alive.any(1).all():
        raise ValueError(
            f"living has shape {alive.shape}: {(spec.trees, spec.leaves)} is expected, a leaf in each tree"
        )
    node_rows: list[int] = []  # tree·M + heap index of every node kept
    branches: list[tuple[int, int]] = []
    origin: list[int] = []

    def visit(tree: int, heap: int, first: int, last: int) -> int:
        """Reference of what is left of the subtree over leaves first..last, one of them alive."""
        if heap >= spec.nodes:
            origin.append(tree * spec.leaves + first)
            return ~(len(origin) - 1)
        middle = (first + last) // 2
        sides = [(2 * heap + 1, first, middle), (2 * heap + 2, middle, last)]
        left = [side for side in sides if alive[tree, side[1] : side[2]].any()]
        if len(left) == 1 and not spec.node_output:
            return visit(tree, *left[0])
        node = len(branches)
        branches.append((0, 0))
        node_rows.append(tree * spec.nodes + heap)
        references = [visit(tree, *side) for side in left]
        branches[node] = (references[0], references[-1])
        return node

    roots = torch.tensor([visit(k, 0, 0, spec.leaves) for k in range(spec.trees)])
    d, width = layer.w_in.shape[-1], spec.leaf_width
    ragged = RaggedFeedForward(
        d,
        layer.tree,
        roots,
        torch.tensor(branches, dtype=torch.int64).view(-1, 2),
        torch.tensor(origin),
        backend=layer.backend,
    )
    nodes = torch.tensor(node_rows, dtype=torch.int64)
    tree, leaf = ragged.origin // spec.leaves, ragged.origin % spec.leaves

    def rows(weights: Tensor, with_nodes: bool) -> Tensor:
        """Rows of [K, M + L·W, …] (or leaves only) in the ragged layer's order."""
        first = spec.nodes if with_nodes else 0
        units = weights[tree[:, None], first + leaf[:, None] * width + torch.arange(width)].flatten(0, 1)
        return (
            torch.cat([weights[nodes // max(1, spec.nodes), nodes % max(1, spec.nodes)], units])
            if with_nodes
            else units
        )

    def of_nodes(values: Tensor) -> Tensor:
        return values.flatten(0, 1)[nodes]

    with torch.no_grad():
        ragged.to(device=layer.w_in.device, dtype=layer.w_in.dtype)
        ragged.w_in.copy_(rows(layer.w_in, True))
        ragged.w_out.copy_(rows(layer.w_out, spec.node_output))
        if ragged.b is not None and layer.b is not None:
            ragged.b.copy_(rows(layer.b, True))
        thresholds = layer.effective_thresholds()
        if thresholds is not None:
            ragged.thresholds.copy_(of_nodes(thresholds))
        if ragged.router_w is not None and layer.router_w is not None:
            ragged.router_w.copy_(of_nodes(layer.router_w))
        if ragged.router_b is not None and layer.router_b is not None:
            ragged.router_b.copy_(of_nodes(layer.router_b))
    return ragged.train(layer.training)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the submodule called `name` by `layer`."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def shape_like(model: nn.Module, state: dict[str, Any]) -> None:
    """Make tree layers ragged where a state dict has ragged ones, so that it can be loaded."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, TreeFeedForward) and f"{name}.branches" in state:
            roots, branches, origin = (state[f"{name}.{key}"] for key in ("roots", "branches", "origin"))
            ragged = RaggedFeedForward(layer.w_in.shape[-1], layer.tree, roots, branches, origin, backend=layer.backend)
            replace_layer(model, name, ragged)
