"""The layer as one operator: dispatch, `torch.library` registration, fake implementation and autograd.

The work is done by a backend (see `backend`); the reference goes through ordinary autograd instead. The operators take
the spec as its key, a string.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ablate.kernels import reference
from ablate.kernels.backend import BACKENDS, REFERENCE, choose, load
from ablate.kernels.spec import NodeBackward, TreeSpec, parse_spec

T = TypeVar("T", Tensor, Tensor | None)

INSTEAD = "with backend='reference', plain PyTorch, it has one"


class TreeOutput(NamedTuple):
    """What one call of the layer returns: y [..., d]; leaves int32 [N, K]; path responses [N, K, D + W], detached."""

    y: Tensor
    leaves: Tensor
    responses: Tensor


def tree_feedforward(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    spec: TreeSpec,
    *,
    thresholds: Tensor | None = None,
    leaves: Tensor | None = None,
    backend: str = "auto",
    node_backward: NodeBackward = "own",
) -> TreeOutput:
    """K binary trees over tokens x [..., d]; each token computes one root-to-leaf path per tree.

    `w_in` [K, M + L·W, d], `b` [K, M + L·W] or None, `w_out` [K, R, d], `thresholds` float [K, M] (0 where None),
    `leaves` int [N, K] to follow instead of routing. Gradients reach x, w_in, b and w_out; the branch decision has none.
    `node_backward` replaces phi' in the gradients of the nodes' rows of w_in and b, and nowhere else (see
    `reference.node_slope`). The gradients have no gradients, and there is no forward-mode derivative, but in the backend
    "reference": asked for, they are a RuntimeError. Raises ValueError on shapes and dtypes that do not fit.
    Sources: arXiv 2604.08565, 2311.10770, 2308.14711.
    """
    d, n = x.shape[-1], x.numel() // max(1, x.shape[-1])
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "w_in": (w_in, (spec.trees, spec.in_rows, d)),
        "b": (b, (spec.trees, spec.in_rows)),
        "w_out": (w_out, (spec.trees, spec.out_rows, d)),
        "thresholds": (thresholds, (spec.trees, spec.nodes)),
        "leaves": (leaves, (n, spec.trees)),
    }
    check_shapes(wanted, x, spec)
    check_input(x, w_in)
    if node_backward != "own" and not (spec.placement == "unit" and spec.node_output):
        raise ValueError(f"node_backward is {node_backward!r}: it needs placement 'unit' and node_output on")
    dtype, given = compute_dtype(x, w_in, backend), output_dtype(x)
    flat, w_in = cast_to(dtype, x.reshape(-1, d)), cast_to(dtype, w_in)
    b, w_out = cast_to(dtype, b), cast_to(dtype, w_out)
    chosen = choose(backend, flat.device, flat.dtype)
    with without_autocast(x.device):
        if chosen == REFERENCE:
            y, leaves, responses = reference.forward(flat, w_in, b, w_out, thresholds, leaves, spec, node_backward)
        else:
            refuse_tangents(flat, w_in, b, w_out)
            y, leaves, responses = forward_operator(
                flat, w_in, b, w_out, thresholds, leaves, chosen, spec.key, node_backward
            )
        return TreeOutput(y.to(given).reshape(x.shape), leaves, responses)


def route(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    spec: TreeSpec,
    *,
    thresholds: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return leaves int32 [N, K] and node responses on the path [N, K, D] for x [..., d], without computing outputs."""
    dtype = compute_dtype(x, w_in, backend)
    flat, w = cast_to(dtype, x.detach().reshape(-1, x.shape[-1])), cast_to(dtype, w_in.detach())
    bias = cast_to(dtype, None if b is None else b.detach())
    chosen = choose(backend, flat.device, flat.dtype)
    with without_autocast(x.device):
        if chosen == REFERENCE:
            return reference.route(flat, w, bias, thresholds, spec)
        leaves, z = route_operator(flat, w, bias, thresholds, chosen, spec.key)
        return leaves, z


def check_input(x: Tensor, w_in: Tensor) -> None:
    """Raise ValueError where an input x [..., d] does not fit a layer's weights [..., d]; the message says what would."""
    if x.ndim == 0 or x.shape[-1] != w_in.shape[-1]:
        has = f"{x.shape[-1]} features" if x.ndim else "no features"
        raise ValueError(f"the input has {has}, the layer takes {w_in.shape[-1]}: its shape is {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"the input is {x.dtype}: floating-point numbers are expected")
    if x.device != w_in.device:
        raise ValueError(f"the input is on {x.device}, the layer on {w_in.device}: move one of them")
    if x.dtype != w_in.dtype and autocast_dtype(x.device) is None:
        raise ValueError(f"the input is {x.dtype}, the layer {w_in.dtype}: convert one of them, or use torch.autocast")


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise RuntimeError where forward-mode differentiation is under way: the operator would return a derivative of 0."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError(f"the tree layer has no forward-mode derivative: {INSTEAD}")


def check_shapes(wanted: Mapping[str, tuple[Tensor | None, tuple[int, ...]]], x: Tensor, spec: TreeSpec) -> None:
    """Raise ValueError where a tensor does not have the shape beside it; the message names both."""
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for {spec} and x {tuple(x.shape)}"
            )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype on a device; None where autocast is off, or the device (meta) knows none."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def compute_dtype(x: Tensor, w_in: Tensor, backend: str = "auto") -> torch.dtype | None:
    """Return the dtype that x and the weights are to be cast to; None where autocast is off: they stay as they are.

    Under autocast it is autocast's on GPUs and the weights' on CPUs: their kernels compute in float32 at least, so
    that rounding the weights first would cost time and move routes for nothing.
    """
    wanted = autocast_dtype(x.device)
    if wanted is None:
        return None
    name = choose(backend, x.device, w_in.dtype)
    widens = x.device.type == "cpu" and (name == REFERENCE or BACKENDS[name].device == "cpu")
    return w_in.dtype if widens else wanted


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of y: autocast's where it is on, and x's elsewhere."""
    return autocast_dtype(x.device) or x.dtype


def cast_to(dtype: torch.dtype | None, tensor: T) -> T:
    """Return a tensor in a dtype, as it is for None; None stays None."""
    return tensor if tensor is None or dtype is None else tensor.to(dtype)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which operations on a device keep the dtypes of their arguments."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return a gradient, or an empty tensor for None, which an operator may not return."""
    return like.new_empty(0) if gradient is None else gradient


@torch.library.custom_op("ablate::tree_forward", mutates_args=())
def forward_operator(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    leaves: Tensor | None,
    backend: str,
    spec: str,
    node_backward: str = "own",
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass of `backend` for the spec with key `spec`; see `tree_feedforward`."""
    y, taken, responses = load(backend).forward(x, w_in, b, w_out, thresholds, leaves, parse_spec(spec))
    # An operator may not return one of its arguments.
    return y, leaves.clone() if leaves is not None and taken is leaves else taken, responses


@forward_operator.register_fake
def _(x, w_in, b, w_out, thresholds, leaves, backend, spec, node_backward="own"):  # type: ignore[no-untyped-def]
    n, shape = x.shape[0], parse_spec(spec)
    return (
        x.new_empty(x.shape),  # contiguous, also where x is not
        x.new_empty((n, shape.trees), dtype=torch.int32),
        x.new_empty((n, shape.trees, shape.path), dtype=torch.promote_types(x.dtype, torch.float32)),
    )


@torch.library.custom_op("ablate::tree_route", mutates_args=())
def route_operator(
    x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor | None, backend: str, spec: str
) -> tuple[Tensor, Tensor]:
    """The leaves and node responses of `backend` for the spec with key `spec`; see `route`."""
    return load(backend).route(x, w_in, b, thresholds, parse_spec(spec))


@route_operator.register_fake
def _(x, w_in, b, thresholds, backend, spec):  # type: ignore[no-untyped-def]
    n, shape = x.shape[0], parse_spec(spec)
    return (
        x.new_empty((n, shape.trees), dtype=torch.int32),
        x.new_empty((n, shape.trees, shape.depth), dtype=torch.promote_types(x.dtype, torch.float32)),
    )


@torch.library.custom_op("ablate::tree_backward", mutates_args=())
def backward_operator(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    leaves: Tensor,
    responses: Tensor,
    needs: list[bool],
    backend: str,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of `forward_operator`; a gradient that is not needed is an empty tensor."""
    grads = load(backend).backward(gy, x, w_in, b, w_out, leaves, responses, parse_spec(spec), tuple(needs))
    gx, gw_in, gb, gw_out = (or_empty(g, x) for g in grads)
    return gx, gw_in, gb, gw_out


@backward_operator.register_fake
def _(gy, x, w_in, b, w_out, leaves, responses, needs, backend, spec):  # type: ignore[no-untyped-def]
    likes = (x, w_in, b, w_out)
    return tuple(
        t.new_empty(t.shape) if t is not None and n else x.new_empty(0) for t, n in zip(likes, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w_in, b, w_out, _thresholds, _leaves, backend, spec, node_backward = inputs
    _, leaves, responses = output
    ctx.mark_non_differentiable(leaves, responses)
    ctx.set_materialize_grads(False)
    ctx.has_bias, ctx.backend, ctx.spec, ctx.node_backward = b is not None, backend, spec, node_backward
    ctx.save_for_backward(x, w_in, *([b] if b is not None else []), w_out, leaves, responses)


def _backward(ctx: Any, gy: Tensor | None, _leaves: Any, _responses: Any) -> tuple[Any, ...]:
    untouched = (None,) * 5  # thresholds, leaves, backend, spec, node_backward
    if gy is None:
        return (None, None, None, None, *untouched)
    saved = list(ctx.saved_tensors)
    b = saved.pop(2) if ctx.has_bias else None
    x, w_in, w_out, leaves, responses = saved
    needs = list(ctx.needs_input_grad[:4])
    own = ctx.node_backward == "own"
    asked = needs if own else [needs[0], False, False, needs[3]]
    grads = list(backward_operator(gy, x, w_in, b, w_out, leaves, responses, asked, ctx.backend, ctx.spec))
    if not own and (needs[1] or needs[2]):
        grads[1:3] = _other_slope(gy, x, w_in, b, w_out, leaves, responses, needs, ctx)
    kept = [g if n else None for g, n in zip(grads, needs, strict=True)]
    return (*kept, *untouched)


def _other_slope(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    leaves: Tensor,
    responses: Tensor,
    needs: list[bool],
    ctx: Any,
) -> list[Tensor]:
    """Return the gradients of w_in and b with another slope at the nodes, by the backend's own kernels.

    A backward kernel learns phi' from the spec and the recorded responses alone, so other slopes are other arguments.
    """
    spec = parse_spec(ctx.spec)
    flipped = torch.cat([-responses[..., : spec.depth], responses[..., spec.depth :]], dim=-1)
    ways = {
        "flip": [(spec, flipped)],
        "flat": [(spec, responses), (spec, flipped)],
        "base": [(dataclasses.replace(spec, node_mirror=0.0), responses)],
    }[ctx.node_backward]
    found = [
        backward_operator(gy, x, w_in, b, w_out, leaves, z, [False, *needs[1:3], False], ctx.backend, way.key)[1:3]
        for way, z in ways
    ]
    return [cast(Tensor, sum(parts)) / len(ways) for parts in zip(*found, strict=True)]


def no_second(ctx: Any, *_: Any) -> Any:
    """Say that a gradient cannot be differentiated, where autograd asks for that."""
    raise RuntimeError(f"the tree layer's gradient has no gradient of its own (no second derivative): {INSTEAD}")


forward_operator.register_autograd(_backward, setup_context=_setup_context)
backward_operator.register_autograd(no_second)
