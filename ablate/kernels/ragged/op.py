"""Ragged trees: the layer after pruning, where paths differ in length. One public function, `ragged_feedforward`.

A reference is a node's index where it is >= 0, and the leaf ~r otherwise. Nodes and leaves of all K trees are numbered
through, leaves from left to right, tree after tree. A node whose two branches are the same is always taken: it has its
output and decides nothing. Letters are those of `spec`; n nodes and l leaves in all, R rows = n + l·W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ablate.kernels.activations import phi, phi_slope
from ablate.kernels.cpu.backend import _activations, _empty, _launch, _plain
from ablate.kernels.op import _SPEC_FIELDS, Backend, TreeOutput, _spec
from ablate.kernels.ragged import passes as kernels
from ablate.kernels.spec import TreeSpec


class Shape(NamedTuple):
    """Where everything is in the trees of one layer: int64 tensors on the CPU, derived from roots and branches."""

    roots: Tensor
    """[K] references."""
    branches: Tensor
    """[n, 2] references: left, right."""
    split: Tensor
    """[n]: first leaf of the right side; one past the last leaf where the node decides nothing."""
    spans: Tensor
    """[n, 2]: the first leaf under a node and one past the last."""
    paths: Tensor
    """[l, D]: nodes above a leaf, root first, then -1."""
    lengths: Tensor
    """[l]."""
    levels: Tensor
    """[n]: a node's place on its paths."""
    trees: Tensor
    """[K + 1]: where each tree's leaves begin."""
    tree_of: Tensor
    """[n + l]: the tree of each node, then of each leaf."""


def shape_of(roots: Sequence[int] | NDArray[Any], branches: NDArray[Any], depth: int) -> Shape:
    """The shape that roots [K] and branches [n, 2] describe, for paths of at most `depth` nodes.

    Raises ValueError where they are no such trees: a node used twice or never, leaves out of order, a path too long.
    """
    nodes, trees = len(branches), len(roots)
    split, spans = np.zeros(nodes, np.int64), np.full((nodes, 2), -1, np.int64)
    levels, node_tree = np.zeros(nodes, np.int64), np.full(nodes, -1, np.int64)
    paths: list[list[int]] = []
    leaf_tree: list[int] = []

    def visit(reference: int, tree: int, above: list[int]) -> None:
        if reference < 0:
            if ~reference != len(paths):
                raise ValueError(
                    f"tree {tree} has leaf {~reference} where {len(paths)} is expected, from left to right"
                )
            paths.append(above)
            leaf_tree.append(tree)
            return
        if reference >= nodes or node_tree[reference] >= 0 or len(above) >= depth:
            raise ValueError(
                f"tree {tree}: node {reference} does not exist, stands in two places or under {depth} nodes"
            )
        node_tree[reference], levels[reference] = tree, len(above)
        left, right = (int(r) for r in branches[reference])
        spans[reference, 0] = len(paths)
        visit(left, tree, [*above, reference])
        split[reference] = len(paths)
        if right != left:
            visit(right, tree, [*above, reference])
        spans[reference, 1] = len(paths)

    starts = []
    for tree, root in enumerate(roots):
        starts.append(len(paths))
        visit(int(root), tree, [])
    if (node_tree < 0).any():
        raise ValueError(f"node {int(np.argmin(node_tree))} belongs to no tree")
    padded = np.full((len(paths), depth), -1, np.int64)
    for leaf, above in enumerate(paths):
        padded[leaf, : len(above)] = above
    arrays = (
        np.asarray(roots, np.int64),
        np.asarray(branches, np.int64).reshape(nodes, 2),
        split,
        spans,
        padded,
        np.array([len(above) for above in paths], np.int64),
        levels,
        np.array([*starts, len(paths)], np.int64),
        np.concatenate([node_tree, np.array(leaf_tree, np.int64)]),
    )
    assert len(arrays[7]) == trees + 1
    return Shape(*(torch.from_numpy(a) for a in arrays))


def ragged_feedforward(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor,
    shape: Shape,
    spec: TreeSpec,
    *,
    leaves: Tensor | None = None,
    backend: Backend = "auto",
) -> TreeOutput:
    """The layer of ragged trees over x [..., d]: y [..., d]; leaves int32 [N, K], numbered through all trees.

    `w_in` [R, d], `b` [R] or None, `w_out` [R, d] (leaf rows only where `spec.node_output` is off), `thresholds` [n],
    `leaves` int [N, K] to follow instead of routing. Responses [N, K, D + W] stand at a node's place on its path, 0
    beyond its end. Backend `cpu` is Numba, others are plain PyTorch. Raises ValueError on shapes that do not fit.
    """
    nodes, leaf_rows = len(shape.branches), len(shape.lengths) * spec.leaf_width
    d = x.shape[-1]
    wanted = {
        "w_in": (w_in, (nodes + leaf_rows, d)),
        "b": (b, (nodes + leaf_rows,)),
        "w_out": (w_out, (nodes * spec.node_output + leaf_rows, d)),
        "thresholds": (thresholds, (nodes,)),
        "leaves": (leaves, (x.numel() // max(1, d), spec.trees)),
    }
    for name, (tensor, size) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != size:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {size} for {spec} and x {tuple(x.shape)}"
            )
    flat = x.reshape(-1, d)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        flat, w_in, w_out = flat.to(dtype), w_in.to(dtype), w_out.to(dtype)
        b = None if b is None else b.to(dtype)
    on_cpu = backend == "cpu" or (backend == "auto" and x.device.type == "cpu")
    with torch.autocast(x.device.type, enabled=False):
        if on_cpu:
            fields = [getattr(spec, name) for name in _SPEC_FIELDS]
            y, taken, responses = _forward_op(flat, w_in, b, w_out, thresholds, leaves, list(shape), *fields)
        else:
            y, taken, responses = reference(flat, w_in, b, w_out, thresholds, leaves, shape, spec)
    return TreeOutput(y.reshape(x.shape), taken, responses)


def route(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    thresholds: Tensor,
    shape: Shape,
    spec: TreeSpec,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Leaves int32 [N, K] and responses [N, K, D] of the nodes that decided, for x [..., d]; no outputs."""
    flat = x.detach().reshape(-1, x.shape[-1])
    if backend == "cpu" or (backend == "auto" and x.device.type == "cpu"):
        plain = _plain(flat), _plain(w_in), _plain(b)
        z, leaves = _down(*plain, thresholds, None, shape, spec, units=False, all_nodes=False)
        return leaves, z[..., : spec.depth]
    with torch.no_grad():
        nodes = len(shape.branches)
        z = flat @ w_in[:nodes].T
        z = z if b is None else z + b[:nodes]
        leaves = _walk(z, thresholds, shape, spec.depth)
        paths = shape.paths.to(z.device)[leaves.long()]
        decides = (shape.branches[:, 0] != shape.branches[:, 1]).to(z.device)
        known = (paths >= 0) & (decides[paths] if nodes else False)
        picked = z.gather(1, paths.clamp(min=0).flatten(1)).view(paths.shape) if nodes else z.new_zeros(paths.shape)
        return leaves, picked * known


def reference(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor,
    leaves: Tensor | None,
    shape: Shape,
    spec: TreeSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: every unit computed, then masked to the path. Plain PyTorch, any device and dtype, autograd."""
    nodes, width = len(shape.branches), spec.leaf_width
    z = x @ w_in.T
    z = z if b is None else z + b
    if leaves is None:
        leaves = _walk(z.detach(), thresholds, shape, spec.depth)
    taken = leaves.long()
    paths = shape.paths.to(x.device)[taken]
    units = nodes + taken[..., None] * width + torch.arange(width, device=x.device)
    rows = torch.cat([paths, units], dim=2)
    on_path = rows >= 0
    responses = z.detach().gather(1, rows.clamp(min=0).flatten(1)).view(rows.shape) * on_path
    first = 0 if spec.node_output else nodes
    # One row more than there is, for places beyond the end of a path.
    mask = torch.zeros(*taken.shape, z.shape[1] + 1, dtype=torch.bool, device=x.device)
    mask = mask.scatter(2, torch.where(on_path, rows, z.shape[1]), True)[..., first:-1]
    z = z[:, first:]
    if spec.placement != "unit":
        summed = torch.einsum("nku,ud->nkd", z[:, None] * mask, w_out)
        if spec.placement == "sum":
            summed = summed.sum(1, keepdim=True)
        y = phi(summed, spec.activation, spec.mirror, spec.leaf_gain).sum(1)
        return y, taken.int(), responses
    cut = nodes - first
    hidden = [
        phi(z[:, :cut], spec.activation, spec.node_mirror, spec.node_gain),
        phi(z[:, cut:], spec.activation, spec.mirror, spec.leaf_gain),
    ]
    return (torch.cat(hidden, dim=1) * mask.any(1)) @ w_out, taken.int(), responses


def _walk(z: Tensor, thresholds: Tensor, shape: Shape, depth: int) -> Tensor:
    """Leaves int32 [N, K] from the responses z [N, at least n] of all nodes."""
    roots, branches = shape.roots.to(z.device), shape.branches.to(z.device)
    at = roots.expand(z.shape[0], -1)
    if len(branches):
        right = (z[:, : len(branches)] > thresholds).long()
        for _ in range(depth):
            node = at.clamp(min=0)
            at = torch.where(at >= 0, branches[node, right.gather(1, node)], at)
    return (~at).int()


def _down(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    thresholds: Tensor,
    leaves: Tensor | None,
    shape: Shape,
    spec: TreeSpec,
    *,
    units: bool,
    all_nodes: bool,
) -> tuple[Tensor, Tensor]:
    """Responses [N, K, D + W], 0 where none was computed, and leaves int32 [N, K]."""
    n = x.shape[0]
    taken = x.new_empty((n, spec.trees), dtype=torch.int32) if leaves is None else leaves.int().contiguous()
    z = x.new_zeros(n, spec.trees, spec.path)
    limits = thresholds.detach().to(x.dtype).contiguous()
    _launch(
        kernels.down, x, w_in, x.new_empty(0) if b is None else b, b is not None, limits, shape.roots, shape.branches,
        shape.split, taken, leaves is not None, z, units, all_nodes, spec.depth, spec.leaf_width, _block(n),
    )  # fmt: skip
    return z, taken


def _up(z: Tensor, w_out: Tensor, leaves: Tensor, shape: Shape, spec: TreeSpec, k0: int, k1: int) -> Tensor:
    """What the units on the paths in trees k0..k1 add up to: [N, d]."""
    y = _empty(z.shape[0], w_out.shape[1], like=z)
    out_nodes = len(shape.branches) if spec.node_output else 0
    _launch(
        kernels.up, z, _activations(spec), w_out, out_nodes, leaves, y, shape.trees, shape.paths, shape.lengths, k0, k1,
        spec.depth, spec.leaf_width, _block(z.shape[0]),
    )  # fmt: skip
    return y


def _ranges(spec: TreeSpec) -> list[tuple[int, int]]:
    """Trees whose outputs are summed before phi."""
    return [(k, k + 1) for k in range(spec.trees)] if spec.placement == "tree" else [(0, spec.trees)]


@torch.library.custom_op("ablate::ragged_forward", mutates_args=())
def _forward_op(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor,
    leaves: Tensor | None,
    shape: list[Tensor],
    trees: int,
    depth: int,
    leaf_width: int,
    node_output: bool,
    placement: str,
    activation: str,
    mirror: float,
    node_mirror: float,
    node_gain: float,
    leaf_gain: float,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = _spec(
        trees, depth, leaf_width, node_output, placement, activation, mirror, node_mirror, node_gain, leaf_gain
    )
    at = Shape(*shape)
    dtype = x.dtype
    x, w_in, b, w_out = _plain(x), _plain(w_in), _plain(b), _plain(w_out)
    z, taken = _down(x, w_in, b, thresholds, leaves, at, spec, units=True, all_nodes=True)
    if spec.placement == "unit":
        y = _up(z, w_out, taken, at, spec, 0, trees)
    else:
        parts = [
            phi(_up(z, w_out, taken, at, spec, *r), spec.activation, spec.mirror, spec.leaf_gain) for r in _ranges(spec)
        ]
        y = parts[0]
        for part in parts[1:]:
            y += part
    return y.to(dtype), taken.clone() if taken is leaves else taken, z


@_forward_op.register_fake
def _(x, w_in, b, w_out, thresholds, leaves, shape, trees, depth, leaf_width, *rest):  # type: ignore[no-untyped-def]
    n = x.shape[0]
    return (
        torch.empty_like(x),
        x.new_empty((n, trees), dtype=torch.int32),
        x.new_empty((n, trees, depth + leaf_width), dtype=torch.promote_types(x.dtype, torch.float32)),
    )


@torch.library.custom_op("ablate::ragged_backward", mutates_args=())
def _backward_op(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    leaves: Tensor,
    responses: Tensor,
    shape: list[Tensor],
    needs: list[bool],
    trees: int,
    depth: int,
    leaf_width: int,
    node_output: bool,
    placement: str,
    activation: str,
    mirror: float,
    node_mirror: float,
    node_gain: float,
    leaf_gain: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec = _spec(
        trees, depth, leaf_width, node_output, placement, activation, mirror, node_mirror, node_gain, leaf_gain
    )
    at = Shape(*shape)
    dtype = x.dtype
    x, w_in, w_out, gy = _plain(x), _plain(w_in), _plain(w_out), _plain(gy)
    grads = torch.zeros_like(x), torch.zeros_like(w_in), w_in.new_zeros(len(w_in)), torch.zeros_like(w_out)
    if spec.placement == "unit":
        _chain(gy, x, w_in, w_out, leaves, responses, grads, needs, at, spec, 0, trees)
    else:
        for k0, k1 in _ranges(spec):
            summed = _up(responses, w_out, leaves, at, spec, k0, k1)
            gs = phi_slope(summed, spec.activation, spec.mirror, spec.leaf_gain).mul_(gy)
            _chain(gs, x, w_in, w_out, leaves, responses, grads, needs, at, spec, k0, k1)
    wanted = [n and (i != 2 or b is not None) for i, n in enumerate(needs)]
    return tuple(g.to(dtype) if n else x.new_empty(0) for g, n in zip(grads, wanted, strict=True))  # type: ignore[return-value]


@_backward_op.register_fake
def _(gy, x, w_in, b, w_out, leaves, responses, shape, needs, *rest):  # type: ignore[no-untyped-def]
    likes = (x, w_in, b, w_out)
    return tuple(
        torch.empty_like(t) if t is not None and n else x.new_empty(0) for t, n in zip(likes, needs, strict=True)
    )


def _chain(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    leaves: Tensor,
    z: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    needs: Sequence[bool],
    shape: Shape,
    spec: TreeSpec,
    k0: int,
    k1: int,
) -> None:
    """Add the gradients of trees k0..k1 to `grads`; `gy` is that of what the units' outputs are added up to."""
    gx, gw_in, gb, gw_out = grads
    nodes, n = len(shape.branches), x.shape[0]
    out_nodes = nodes if spec.node_output else 0
    wants_in, wants_out = needs[1] or needs[2], needs[3]
    dz, acts = torch.zeros_like(z), _activations(spec)
    _launch(
        kernels.back, gy, w_out, out_nodes, w_in, z, acts, leaves, dz, gx, needs[0], shape.trees, shape.paths,
        shape.lengths, nodes, k0, k1, spec.depth, spec.leaf_width, _block(n),
    )  # fmt: skip
    if wants_in or wants_out:
        starts = np.empty(len(shape.lengths) + spec.trees, np.int64)
        order = np.empty((spec.trees, n), np.int64)
        asked = torch.where((shape.tree_of >= k0) & (shape.tree_of < k1), shape.tree_of, -1)
        _launch(kernels.sort, leaves, shape.trees, k0, k1, starts, order)
        _launch(
            kernels.gradients, x, gy, z, acts, dz, order, starts, asked, shape.levels, shape.spans, gw_in, gb, gw_out,
            out_nodes, wants_in, wants_out, spec.depth, spec.leaf_width,
        )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w_in, b, w_out, _thresholds, _leaves, shape, *fields = inputs
    _, leaves, responses = output
    ctx.mark_non_differentiable(leaves, responses)
    ctx.set_materialize_grads(False)
    ctx.has_bias, ctx.fields = b is not None, fields
    ctx.save_for_backward(x, w_in, *([b] if b is not None else []), w_out, leaves, responses, *shape)


def _backward(ctx: Any, gy: Tensor | None, _leaves: Any, _responses: Any) -> tuple[Any, ...]:
    untouched = (None, None, [None] * len(Shape._fields), *([None] * len(ctx.fields)))
    if gy is None:
        return (None, None, None, None, *untouched)
    saved = list(ctx.saved_tensors)
    b = saved.pop(2) if ctx.has_bias else None
    x, w_in, w_out, leaves, responses, *shape = saved
    needs = list(ctx.needs_input_grad[:4])
    grads = _backward_op(gy, x, w_in, b, w_out, leaves, responses, shape, needs, *ctx.fields)
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *untouched)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _block(tokens: int) -> int:
    """Tokens of one task: enough that a leaf's share of them is more than one or two."""
    return max(1, min(2048, tokens))
