"""The layer of ragged trees as one operator; shapes, links and numbering are those of `shape`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ablate.kernels.backend import choose, has_ragged, load_ragged
from ablate.kernels.op import (
    TreeOutput,
    cast_to,
    check_input,
    check_shapes,
    compute_dtype,
    no_second,
    or_empty,
    output_dtype,
    refuse_tangents,
    without_autocast,
)
from ablate.kernels.ragged import reference
from ablate.kernels.ragged.shape import Shape
from ablate.kernels.spec import TreeSpec, parse_spec


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
    backend: str = "auto",
) -> TreeOutput:
    """Compute the layer of ragged trees over x [..., d]: y [..., d]; leaves int32 [N, K], numbered through all trees.

    `w_in` [R, d], `b` [R] or None, `w_out` [R, d] (leaf rows only where `spec.node_output` is off), `thresholds` [n],
    `leaves` int [N, K] to follow instead of routing. Responses [N, K, D + W] are in the column of a node's level, 0
    beyond the end of its path. Backends without kernels for ragged trees are computed by plain PyTorch. Raises
    ValueError on shapes and dtypes that do not fit.
    """
    nodes, leaf_rows = len(shape.branches), len(shape.lengths) * spec.leaf_width
    d = x.shape[-1]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "w_in": (w_in, (nodes + leaf_rows, d)),
        "b": (b, (nodes + leaf_rows,)),
        "w_out": (w_out, (nodes * spec.node_output + leaf_rows, d)),
        "thresholds": (thresholds, (nodes,)),
        "leaves": (leaves, (x.numel() // max(1, d), spec.trees)),
    }
    check_shapes(wanted, x, spec)
    check_input(x, w_in)
    dtype, given = compute_dtype(x, w_in, backend), output_dtype(x)
    flat, w_in = cast_to(dtype, x.reshape(-1, d)), cast_to(dtype, w_in)
    b, w_out = cast_to(dtype, b), cast_to(dtype, w_out)
    chosen = choose(backend, flat.device, flat.dtype)
    with without_autocast(x.device):
        if not has_ragged(chosen):
            y, taken, responses = reference.forward(flat, w_in, b, w_out, thresholds, leaves, shape, spec)
        else:
            refuse_tangents(flat, w_in, b, w_out)
            y, taken, responses = forward_operator(
                flat, w_in, b, w_out, thresholds, leaves, list(shape), chosen, spec.key
            )
        return TreeOutput(y.to(given).reshape(x.shape), taken, responses)


def route(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    thresholds: Tensor,
    shape: Shape,
    spec: TreeSpec,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return leaves int32 [N, K] and responses [N, K, D] of the nodes that decided, for x [..., d]; no outputs."""
    dtype = compute_dtype(x, w_in, backend)
    flat, w = cast_to(dtype, x.detach().reshape(-1, x.shape[-1])), cast_to(dtype, w_in.detach())
    bias = cast_to(dtype, None if b is None else b.detach())
    chosen = choose(backend, flat.device, flat.dtype)
    with without_autocast(x.device):
        if not has_ragged(chosen):
            return reference.route(flat, w, bias, thresholds, shape, spec)
        leaves, z = route_operator(flat, w, bias, thresholds, list(shape), chosen, spec.key)
        return leaves, z


@torch.library.custom_op("ablate::ragged_forward", mutates_args=())
def forward_operator(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor,
    leaves: Tensor | None,
    shape: list[Tensor],
    backend: str,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass of `backend` for the spec with key `spec`; see `ragged_feedforward`."""
    y, taken, responses = load_ragged(backend).forward(
        x, w_in, b, w_out, thresholds, leaves, Shape(*shape), parse_spec(spec)
    )
    # An operator may not return one of its arguments.
    return y, taken.clone() if taken is leaves else taken, responses


@forward_operator.register_fake
def _(x, w_in, b, w_out, thresholds, leaves, shape, backend, spec):  # type: ignore[no-untyped-def]
    n, like = x.shape[0], parse_spec(spec)
    return (
        torch.empty_like(x),
        x.new_empty((n, like.trees), dtype=torch.int32),
        x.new_empty((n, like.trees, like.path), dtype=torch.promote_types(x.dtype, torch.float32)),
    )


@torch.library.custom_op("ablate::ragged_route", mutates_args=())
def route_operator(
    x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor, shape: list[Tensor], backend: str, spec: str
) -> tuple[Tensor, Tensor]:
    """The leaves and node responses of `backend` for the spec with key `spec`; see `route`."""
    leaves, z = load_ragged(backend).route(x, w_in, b, thresholds, Shape(*shape), parse_spec(spec))
    return leaves, z.contiguous()


@route_operator.register_fake
def _(x, w_in, b, thresholds, shape, backend, spec):  # type: ignore[no-untyped-def]
    n, like = x.shape[0], parse_spec(spec)
    return (
        x.new_empty((n, like.trees), dtype=torch.int32),
        x.new_empty((n, like.trees, like.depth), dtype=torch.promote_types(x.dtype, torch.float32)),
    )


@torch.library.custom_op("ablate::ragged_backward", mutates_args=())
def backward_operator(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    leaves: Tensor,
    responses: Tensor,
    shape: list[Tensor],
    needs: list[bool],
    backend: str,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of `forward_operator`; a gradient that is not needed is an empty tensor."""
    grads = load_ragged(backend).backward(
        gy, x, w_in, b, w_out, leaves, responses, Shape(*shape), parse_spec(spec), needs
    )
    gx, gw_in, gb, gw_out = (or_empty(g, x) for g in grads)
    return gx, gw_in, gb, gw_out


@backward_operator.register_fake
def _(gy, x, w_in, b, w_out, leaves, responses, shape, needs, backend, spec):  # type: ignore[no-untyped-def]
    likes = (x, w_in, b, w_out)
    return tuple(
        torch.empty_like(t) if t is not None and n else x.new_empty(0) for t, n in zip(likes, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w_in, b, w_out, _thresholds, _leaves, shape, backend, spec = inputs
    _, leaves, responses = output
    ctx.mark_non_differentiable(leaves, responses)
    ctx.set_materialize_grads(False)
    ctx.has_bias, ctx.backend, ctx.spec = b is not None, backend, spec
    ctx.save_for_backward(x, w_in, *([b] if b is not None else []), w_out, leaves, responses, *shape)


def _backward(ctx: Any, gy: Tensor | None, _leaves: Any, _responses: Any) -> tuple[Any, ...]:
    untouched = (None, None, [None] * len(Shape._fields), None, None)  # thresholds, leaves, shape, backend, spec
    if gy is None:
        return (None, None, None, None, *untouched)
    saved = list(ctx.saved_tensors)
    b = saved.pop(2) if ctx.has_bias else None
    x, w_in, w_out, leaves, responses, *shape = saved
    needs = list(ctx.needs_input_grad[:4])
    grads = backward_operator(gy, x, w_in, b, w_out, leaves, responses, shape, needs, ctx.backend, ctx.spec)
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *untouched)


forward_operator.register_autograd(_backward, setup_context=_setup_context)
backward_operator.register_autograd(no_second)
