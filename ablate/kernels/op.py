"""The layer as one operator: dispatch, `torch.library` registration, fake implementation and autograd.

Every backend module has the same two functions over flat tensors:

    forward(x, w_in, b, w_out, thresholds, leaves, spec) -> (y, leaves, responses)
    backward(gy, x, w_in, b, w_out, leaves, responses, spec, needs) -> (gx, gw_in, gb, gw_out), None where not needed

`cpu` is Numba, `triton` the GPU kernels; `reference` is plain PyTorch and goes through ordinary autograd instead.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ablate.kernels import reference
from ablate.kernels.spec import NodeBackward, TreeSpec

Backend = Literal["auto", "reference", "cpu", "triton"]
_MODULES = {"cpu": "ablate.kernels.cpu.backend", "triton": "ablate.kernels.triton.backend"}
_SPEC_FIELDS = tuple(TreeSpec.__dataclass_fields__)


class TreeOutput(NamedTuple):
    """What one call of the layer gives: y [..., d]; leaves int32 [N, K]; path responses [N, K, D + W], detached."""

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
    backend: Backend = "auto",
    node_backward: NodeBackward = "own",
) -> TreeOutput:
    """K binary trees over tokens x [..., d]; each token computes one root-to-leaf path per tree.

    `w_in` [K, M + L·W, d], `b` [K, M + L·W] or None, `w_out` [K, R, d], `thresholds` float [K, M] (0 where None),
    `leaves` int [N, K] to follow instead of routing. Gradients reach x, w_in, b and w_out; the branch decision has none.
    `node_backward` replaces phi' in the gradients of the nodes' rows of w_in and b, and nowhere else (see
    `reference.node_slope`). Raises ValueError on shapes that do not fit.
    Sources: arXiv 2604.08565, 2311.10770, 2308.14711.
    """
    _check(x, w_in, b, w_out, spec, thresholds, leaves)
    if node_backward != "own" and not (spec.placement == "unit" and spec.node_output):
        raise ValueError(f"node_backward is {node_backward!r}: it needs placement 'unit' and node_output on")
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        flat, w_in, w_out = flat.to(dtype), w_in.to(dtype), w_out.to(dtype)
        b = None if b is None else b.to(dtype)
    chosen = choose_backend(flat) if backend == "auto" else backend
    with torch.autocast(x.device.type, enabled=False):
        if chosen == "reference":
            y, leaves, responses = reference.forward(flat, w_in, b, w_out, thresholds, leaves, spec, node_backward)
        else:
            own = node_backward == "own"
            w, bias = (w_in, b) if own else (w_in.detach(), None if b is None else b.detach())
            y, leaves, responses = _forward_op(
                flat, w, bias, w_out, thresholds, leaves, chosen, *(getattr(spec, f) for f in _SPEC_FIELDS)
            )
            if not own:
                y = _OtherSlope.apply(  # type: ignore[no-untyped-call]
                    y, w_in, b, flat, w_out, leaves, responses, spec, chosen, node_backward
                )
    return TreeOutput(y.reshape(x.shape), leaves, responses)


def route(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    spec: TreeSpec,
    *,
    thresholds: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Leaves int32 [N, K] and node responses on the path [N, K, D] for x [..., d], without computing outputs."""
    flat = x.detach().reshape(-1, x.shape[-1])
    chosen = choose_backend(flat) if backend == "auto" else backend
    routed: tuple[Tensor, Tensor] = _module(chosen).route(
        flat, w_in.detach(), None if b is None else b.detach(), thresholds, spec
    )
    return routed


def choose_backend(x: Tensor) -> Literal["reference", "cpu", "triton"]:
    """The backend that `auto` means for a tensor's device and dtype."""
    if x.device.type == "cpu" and x.dtype in {torch.float32, torch.float64, torch.bfloat16}:
        return "cpu"
    if x.device.type == "cuda" and x.dtype in {torch.float32, torch.bfloat16}:
        return "triton"
    return "reference"


def _module(backend: str) -> ModuleType | Any:
    return reference if backend == "reference" else importlib.import_module(_MODULES[backend])


def _check(
    x: Tensor, w_in: Tensor, b: Tensor | None, w_out: Tensor, spec: TreeSpec, t: Tensor | None, leaves: Tensor | None
) -> None:
    """Every tensor against the shape its name promises; the message names both."""
    d, tokens = x.shape[-1], x.numel() // max(1, x.shape[-1])
    wanted = {
        "w_in": (w_in, (spec.trees, spec.in_rows, d)),
        "b": (b, (spec.trees, spec.in_rows)),
        "w_out": (w_out, (spec.trees, spec.out_rows, d)),
        "thresholds": (t, (spec.trees, spec.nodes)),
        "leaves": (leaves, (tokens, spec.trees)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for {spec} and x {tuple(x.shape)}"
            )


@torch.library.custom_op("ablate::tree_forward", mutates_args=())
def _forward_op(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    leaves: Tensor | None,
    backend: str,
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
    y, taken, responses = _module(backend).forward(x, w_in, b, w_out, thresholds, leaves, spec)
    # An operator may not return one of its arguments.
    return y, leaves.clone() if leaves is not None and taken is leaves else taken, responses


@_forward_op.register_fake
def _(x, w_in, b, w_out, thresholds, leaves, backend, trees, depth, leaf_width, *rest):  # type: ignore[no-untyped-def]
    n = x.shape[0]
    return (
        x.new_empty(x.shape),  # contiguous, also where x is not
        x.new_empty((n, trees), dtype=torch.int32),
        x.new_empty((n, trees, depth + leaf_width), dtype=torch.promote_types(x.dtype, torch.float32)),
    )


@torch.library.custom_op("ablate::tree_backward", mutates_args=())
def _backward_op(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    leaves: Tensor,
    responses: Tensor,
    needs: list[bool],
    backend: str,
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
    grads = _module(backend).backward(gy, x, w_in, b, w_out, leaves, responses, spec, tuple(needs))
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


@_backward_op.register_fake
def _(gy, x, w_in, b, w_out, leaves, responses, needs, *rest):  # type: ignore[no-untyped-def]
    likes = (x, w_in, b, w_out)
    return tuple(
        t.new_empty(t.shape) if t is not None and n else x.new_empty(0) for t, n in zip(likes, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w_in, b, w_out, _thresholds, _leaves, backend, *fields = inputs
    _, leaves, responses = output
    ctx.mark_non_differentiable(leaves, responses)
    ctx.set_materialize_grads(False)
    ctx.has_bias, ctx.backend, ctx.fields = b is not None, backend, fields
    ctx.save_for_backward(x, w_in, *([b] if b is not None else []), w_out, leaves, responses)


def _backward(ctx: Any, gy: Tensor | None, _leaves: Any, _responses: Any) -> tuple[Any, ...]:
    untouched = (None,) * (3 + len(ctx.fields))
    if gy is None:
        return (None, None, None, None, *untouched)
    saved = list(ctx.saved_tensors)
    b = saved.pop(2) if ctx.has_bias else None
    x, w_in, w_out, leaves, responses = saved
    needs = list(ctx.needs_input_grad[:4])
    grads = _backward_op(gy, x, w_in, b, w_out, leaves, responses, needs, ctx.backend, *ctx.fields)
    kept = [g if n else None for g, n in zip(grads, needs, strict=True)]
    return (*kept, *untouched)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _OtherSlope(torch.autograd.Function):
    """y unchanged; adds the gradients of w_in and b with another slope at the nodes, by the backend's own kernels.

    A backward kernel learns phi' from the spec and the recorded responses alone, so other slopes are other arguments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        w_in: Tensor,
        b: Tensor | None,
        x: Tensor,
        w_out: Tensor,
        leaves: Tensor,
        responses: Tensor,
        spec: TreeSpec,
        backend: str,
        node_backward: NodeBackward,
    ) -> Tensor:
        ctx.save_for_backward(x, w_in, w_out, leaves, responses, *([] if b is None else [b]))
        ctx.settings = spec, backend, node_backward
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        x, w_in, w_out, leaves, responses, *rest = ctx.saved_tensors
        b = rest[0] if rest else None
        spec, backend, node_backward = ctx.settings
        flipped = responses.clone()
        flipped[..., : spec.depth].neg_()
        ways = {
            "flip": [(spec, flipped)],
            "flat": [(spec, responses), (spec, flipped)],
            "base": [(dataclasses.replace(spec, node_mirror=0.0), responses)],
        }[node_backward]
        needs = [False, ctx.needs_input_grad[1], b is not None and ctx.needs_input_grad[2], False]
        gw, gb = torch.zeros_like(w_in), None if b is None else torch.zeros_like(b)
        for way, z in ways:
            fields = (getattr(way, f) for f in _SPEC_FIELDS)
            grads = _backward_op(gy, x, w_in, b, w_out, leaves, z, needs, backend, *fields)
            gw = gw.add_(grads[1], alpha=1 / len(ways)) if needs[1] else gw
            gb = gb.add_(grads[2], alpha=1 / len(ways)) if gb is not None and needs[2] else gb
        return (gy, gw, gb, *(None,) * 7)


def _spec(*fields: Any) -> TreeSpec:
    return TreeSpec(**dict(zip(_SPEC_FIELDS, fields, strict=True)))
