"""The operator as the rest of PyTorch sees it: opcheck, fake tensors, autocast, torch.compile, checkpoints, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ablate.kernels import op
from ablate.kernels.backend import choose
from ablate.kernels.op import tree_feedforward
from ablate.kernels.spec import NodeBackward, TreeSpec
from tests.kernels.contract import CASES, Case, Layer, tree

CASE = CASES[0]


def forward_arguments(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    layer = Layer.of(case, dtype, "cpu")
    b = None if layer.b is None else layer.b.requires_grad_()
    tensors = (layer.x.requires_grad_(), layer.w_in.requires_grad_(), b, layer.w_out.requires_grad_())
    return (*tensors, layer.thresholds, None, "cpu", case.spec.key)


OPCHECKED = [
    CASE,
    replace(CASE, why="no bias, thresholds", bias=False, thresholds=True),
    replace(CASE, why="no tokens", tokens=0),
    replace(CASE, why="not contiguous, node output off", strided=True, spec=tree(node_output=False)),
    replace(CASE, why="placement tree", spec=tree(placement="tree")),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_forward_operator_keeps_torchs_rules(case: Case) -> None:
    torch.library.opcheck(op.forward_operator, forward_arguments(case, torch.float32))


def test_forward_operator_keeps_torchs_rules_with_given_leaves() -> None:
    arguments = list(forward_arguments(CASE, torch.float64))
    arguments[5] = torch.zeros(CASE.tokens, CASE.spec.trees, dtype=torch.int32)
    torch.library.opcheck(op.forward_operator, tuple(arguments))


@pytest.mark.parametrize("needs", [[True] * 4, [False, True, True, True], [True, False, False, False]])
def test_backward_operator_keeps_torchs_rules(needs: list[bool]) -> None:
    layer = Layer.of(CASE, torch.float32, "cpu")
    out, _ = layer.call("cpu")
    arguments = (
        layer.gy,
        layer.x,
        layer.w_in,
        layer.b,
        layer.w_out,
        out.leaves,
        out.responses,
        needs,
        "cpu",
        CASE.spec.key,
    )
    torch.library.opcheck(op.backward_operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(dtype: torch.dtype) -> None:
    layer = Layer.of(CASE, dtype, "cpu")
    real, _ = layer.call("cpu")
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in (layer.x, layer.w_in, layer.b, layer.w_out) if t is not None]
        fake = tree_feedforward(tensors[0], tensors[1], tensors[2], tensors[3], CASE.spec, backend="cpu")
    for got, want in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_on_a_cpu_rounds_the_output_and_nothing_else(backend: str) -> None:
    layer = Layer.of(replace(CASE, thresholds=True), torch.float32, "cpu")
    layer = replace(layer, gy=layer.gy.bfloat16().float())  # the gradient of a bfloat16 output is one
    want, want_grads = layer.call(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = layer.call(backend)
    assert torch.equal(out.y, want.y.bfloat16())
    assert torch.equal(out.leaves, want.leaves)
    assert torch.equal(out.responses, want.responses)
    for name, grad in (
        grads.items() if backend == "cpu" else ()
    ):  # autocast rounds autograd's own products, run within it
        assert torch.equal(grad, want_grads[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_by_the_kernels_in_float32(dtype: torch.dtype) -> None:
    layer = Layer.of(CASE, dtype, "cpu")
    assert choose("auto", layer.x.device, dtype) == "cpu"
    wide = replace(layer, **{n: getattr(layer, n).float() for n in ("x", "w_in", "b", "w_out", "gy")})
    (out, grads), (want, want_grads) = layer.call("auto"), wide.call("cpu")
    assert torch.equal(out.y, want.y.to(dtype))
    assert torch.equal(out.leaves, want.leaves)
    for name, grad in grads.items():
        assert torch.equal(grad, want_grads[name].to(dtype)), name


class Block(nn.Module):
    """A layer between two others, so that a compiled graph has neighbours to fuse and a view to make."""

    def __init__(self) -> None:
        super().__init__()
        layer = Layer.of(CASE, torch.float32, "cpu")
        assert layer.b is not None
        self.norm = nn.LayerNorm(CASE.d)
        self.w_in, self.b, self.w_out = (nn.Parameter(t) for t in (layer.w_in, layer.b, layer.w_out))

    def forward(self, x: Tensor) -> Tensor:
        return x + tree_feedforward(self.norm(x), self.w_in, self.b, self.w_out, CASE.spec).y.tanh()


def test_compiles_without_a_graph_break() -> None:
    eager = Block()
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 5, CASE.d, generator=torch.Generator().manual_seed(batch))
        results = []
        for module in (eager, compiled):
            eager.zero_grad()
            module(x).square().sum().backward()
            results.append([p.grad.clone() for p in eager.parameters() if p.grad is not None])
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    block = Block()
    x = torch.randn(3, 5, CASE.d, generator=torch.Generator().manual_seed(0))
    results = []
    for checkpointed in (False, True):
        block.zero_grad()
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        y.square().sum().backward()
        results.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.equal(got, want)


def test_leading_dimensions_are_flattened_into_tokens() -> None:
    layer = Layer.of(replace(CASE, tokens=24), torch.float32, "cpu")
    flat, _ = layer.call("cpu")
    deep = tree_feedforward(layer.x.view(2, 3, 4, -1), layer.w_in, layer.b, layer.w_out, CASE.spec)
    assert torch.equal(deep.y, flat.y.view(2, 3, 4, -1))
    assert deep.leaves.shape == (24, CASE.spec.trees)


def test_leaves_and_responses_carry_no_gradient() -> None:
    layer = Layer.of(CASE, torch.float32, "cpu")
    out = tree_feedforward(layer.x, layer.w_in.requires_grad_(), layer.b, layer.w_out, CASE.spec)
    assert out.y.requires_grad
    assert not out.leaves.requires_grad
    assert not out.responses.requires_grad


def test_second_derivatives_are_refused_not_wrong() -> None:
    layer = Layer.of(CASE, torch.float64, "cpu")
    w = layer.w_in.requires_grad_()
    y = tree_feedforward(layer.x, w, layer.b, layer.w_out, CASE.spec).y
    (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.square().sum(), w)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("w_in", (2, 22, 24)), ("b", (2, 22)), ("w_out", (2, 23, 25)), ("thresholds", (2, 8)), ("leaves", (36, 2))],
)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...]) -> None:
    layer = Layer.of(CASE, torch.float32, "cpu")
    tensors: dict[str, Any] = {n: getattr(layer, n) for n in ("x", "w_in", "b", "w_out", "thresholds")}
    tensors[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"{name} has shape .*expected"):
        tree_feedforward(spec=CASE.spec, **tensors)


@pytest.mark.parametrize("spec", [CASE.spec, tree(mirror=-1.0, node_mirror=-1.0), tree(mirror=0.4, node_mirror=-0.5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("node_backward", ["flat", "flip", "base"])
def test_kernels_change_the_nodes_slopes_as_the_reference_does(
    node_backward: NodeBackward, bias: bool, spec: TreeSpec
) -> None:
    layer = Layer.of(replace(CASE, spec=spec, bias=bias), torch.float64, "cpu")
    results = []
    for backend in ("reference", "cpu"):
        tensors = [t.detach().requires_grad_() for t in (layer.x, layer.w_in, layer.w_out)]
        b = None if layer.b is None else layer.b.detach().requires_grad_()
        out = tree_feedforward(
            tensors[0], tensors[1], b, tensors[2], spec, backend=backend, node_backward=node_backward
        )
        wanted = tensors if b is None else [*tensors, b]
        results.append([out.y, *torch.autograd.grad(out.y, wanted, layer.gy)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_another_slope_needs_nodes_with_outputs_of_their_own() -> None:
    case = replace(CASE, spec=tree(placement="tree"))
    layer = Layer.of(case, torch.float32, "cpu")
    with pytest.raises(ValueError, match="node_backward is 'flip': it needs placement 'unit'"):
        tree_feedforward(layer.x, layer.w_in, layer.b, layer.w_out, case.spec, node_backward="flip")
