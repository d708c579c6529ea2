"""The contract of design: what every backend of the tree layer must do, against the reference in float64.

A backend's tests subclass `BackendContract`, name the backend and device, and choose dtypes and cases (slow backends
take fewer, or smaller: `CASES` are small already); the hook in conftest.py spreads them over the methods. For
hypothesis, draw from `random_cases(limits)` and call `check`.

Routing is compared first: at every node of the path that a backend took, the reference must agree wherever its response
is further than eps from the threshold. Values are then compared on that path, so that one near-tie proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, get_args

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ablate.kernels import reference
from ablate.kernels.op import TreeOutput, route, tree_feedforward
from ablate.kernels.spec import TRAITS, Activation, Placement, TreeSpec

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest allowed RMS error of a result, relative to the RMS of the reference's in float64 from equal inputs."""
EPSILON = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-5, torch.float16: 1e-5}
"""How near its threshold, relative to |x|·|w| + |b|, a response may decide either way (16-bit inputs are up-cast)."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the layer; `why` says what it provokes and names the test."""

    why: str
    tokens: int
    d: int
    spec: TreeSpec
    bias: bool = True
    thresholds: bool = False
    hot: bool = False
    """All tokens share one leaf (they are small changes of one vector)."""
    strided: bool = False
    """x, w_in and w_out are views that are not contiguous."""
    seed: int = 0

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


def tree(**fields: object) -> TreeSpec:
    """A small tree, with the fields that matter to a case changed."""
    return TreeSpec(**{"trees": 2, "depth": 3, "leaf_width": 2, **fields})  # type: ignore[arg-type]


CASES: tuple[Case, ...] = (
    Case(why="plain", tokens=37, d=24, spec=tree()),
    Case(why="no tokens", tokens=0, d=8, spec=tree()),
    Case(why="one token", tokens=1, d=8, spec=tree()),
    Case(why="two tokens", tokens=2, d=16, spec=tree(trees=1)),
    Case(why="d is one", tokens=9, d=1, spec=tree()),
    Case(why="d smaller than a vector", tokens=9, d=3, spec=tree()),
    Case(why="d odd and larger than a block", tokens=9, d=67, spec=tree()),
    Case(why="depth zero is dense", tokens=9, d=16, spec=tree(depth=0, leaf_width=5)),
    Case(why="depth zero, one tree, one unit", tokens=5, d=16, spec=tree(trees=1, depth=0, leaf_width=1)),
    Case(why="one level", tokens=9, d=16, spec=tree(depth=1, leaf_width=1)),
    Case(why="more leaves than tokens", tokens=5, d=16, spec=tree(depth=6, leaf_width=1, trees=1)),
    Case(why="leaf wider than a block", tokens=13, d=16, spec=tree(leaf_width=11)),
    Case(why="leaf width odd", tokens=13, d=16, spec=tree(leaf_width=3, trees=3)),
    Case(why="all tokens in one leaf", tokens=70, d=16, spec=tree(), hot=True),
    Case(why="no bias", tokens=20, d=16, spec=tree(), bias=False),
    Case(why="thresholds", tokens=20, d=16, spec=tree(), thresholds=True),
    Case(why="thresholds without bias", tokens=20, d=16, spec=tree(), thresholds=True, bias=False),
    Case(why="not contiguous", tokens=20, d=16, spec=tree(), strided=True),
    Case(why="node output off", tokens=20, d=16, spec=tree(node_output=False), thresholds=True),
    Case(why="node output off, placement tree", tokens=20, d=16, spec=tree(node_output=False, placement="tree")),
    Case(why="node output off, depth zero", tokens=20, d=16, spec=tree(node_output=False, depth=0)),
    Case(why="placement tree", tokens=20, d=16, spec=tree(placement="tree", trees=3)),
    Case(why="placement sum", tokens=20, d=16, spec=tree(placement="sum", trees=3)),
    Case(why="placement sum, gain", tokens=20, d=17, spec=tree(placement="sum", leaf_gain=1.7, mirror=0.5)),
    Case(why="placement tree, relu2", tokens=20, d=17, spec=tree(placement="tree", activation="relu2", mirror=-1.0)),
    Case(why="gelu mirror -1 is linear", tokens=20, d=16, spec=tree(mirror=-1.0, node_mirror=-1.0)),
    Case(why="gelu mirror 1 is even", tokens=20, d=16, spec=tree(mirror=1.0, node_mirror=1.0)),
    Case(why="node mirror apart", tokens=20, d=16, spec=tree(mirror=0.25, node_mirror=-1.0)),
    Case(why="gains apart", tokens=20, d=16, spec=tree(node_gain=1.3, leaf_gain=0.7)),
    Case(why="relu", tokens=20, d=16, spec=tree(activation="relu", mirror=-0.1, node_mirror=0.3)),
    Case(why="relu2", tokens=20, d=16, spec=tree(activation="relu2", node_mirror=1.0)),
    Case(why="silu", tokens=20, d=16, spec=tree(activation="silu", mirror=0.5)),
    Case(why="gelu_tanh", tokens=20, d=16, spec=tree(activation="gelu_tanh", node_mirror=-0.5)),
    Case(why="tanh", tokens=20, d=16, spec=tree(activation="tanh")),
)


@st.composite
def random_cases(draw: st.DrawFn, *, tokens: int = 300, d: int = 80, depth: int = 6, leaf_width: int = 9) -> Case:
    """Any layer up to the given sizes. The numbers come from a drawn seed: hypothesis shrinks shapes, not floats."""
    activation: Activation = draw(st.sampled_from(get_args(Activation)))
    mirrors = st.just(0.0) if TRAITS[activation].odd else st.sampled_from((0.0, -1.0, 1.0, 0.5, -0.3))
    spec = TreeSpec(
        trees=draw(st.integers(1, 4)),
        depth=draw(st.integers(0, depth)),
        leaf_width=draw(st.integers(1, leaf_width)),
        node_output=draw(st.booleans()),
        placement=draw(st.sampled_from(get_args(Placement))),
        activation=activation,
        mirror=draw(mirrors),
        node_mirror=draw(mirrors),
        node_gain=draw(st.sampled_from((1.0, 1.6))),
        leaf_gain=draw(st.sampled_from((1.0, 0.8))),
    )
    flags = {name: draw(st.booleans()) for name in ("bias", "thresholds", "hot", "strided")}
    size = draw(st.integers(0, tokens))
    return Case(why="random", tokens=size, d=draw(st.integers(1, d)), spec=spec, seed=draw(st.integers(0, 99)), **flags)


@dataclass(kw_only=True)
class Layer:
    """The tensors of one case on one device, with gradients wanted where a name is in `wants`."""

    case: Case
    x: Tensor
    w_in: Tensor
    b: Tensor | None
    w_out: Tensor
    thresholds: Tensor | None
    gy: Tensor
    wants: Sequence[str] = field(default=("x", "w_in", "b", "w_out"))

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, device: str) -> Layer:
        """Numbers of the sizes that training meets: responses and outputs near one."""
        g, spec, d = torch.Generator().manual_seed(case.seed), case.spec, case.d

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)
            if case.strided:
                values = values.transpose(0, -1).contiguous().transpose(0, -1)
            return values.to(device)

        x = draw(case.tokens, d)
        if case.hot:
            x = (draw(1, d) + 0.01 * x).to(dtype)
        return cls(
            case=case,
            x=x,
            w_in=draw(spec.trees, spec.in_rows, d, scale=d**-0.5),
            b=draw(spec.trees, spec.in_rows, scale=0.3) if case.bias else None,
            w_out=draw(spec.trees, spec.out_rows, d, scale=(spec.trees * spec.path) ** -0.5),
            thresholds=draw(spec.trees, spec.nodes, scale=0.3) if case.thresholds else None,
            gy=draw(case.tokens, d),
        )

    def exact(self) -> Layer:
        """The same numbers in float64 on the CPU."""

        def up(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().cpu()

        tensors = {n: up(getattr(self, n)) for n in ("x", "w_in", "b", "w_out", "thresholds", "gy")}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def call(self, backend: str, leaves: Tensor | None = None) -> tuple[TreeOutput, dict[str, Tensor]]:
        """One forward and backward: the output, and the gradients that are wanted, by name."""
        tensors = {n: getattr(self, n) for n in ("x", "w_in", "b", "w_out")}
        tensors = {n: t if t is None else t.detach().requires_grad_(n in self.wants) for n, t in tensors.items()}
        out = tree_feedforward(
            **tensors, spec=self.case.spec, thresholds=self.thresholds, leaves=leaves, backend=backend
        )
        wanted = {n: t for n, t in tensors.items() if t is not None and n in self.wants}
        grads = torch.autograd.grad(out.y, list(wanted.values()), self.gy, materialize_grads=True) if wanted else ()
        return out, dict(zip(wanted, grads, strict=True))


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """RMS error against RMS size, and no element off by more than 100 times that bound."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    difference = got.detach().double().cpu() - want.detach()
    size = float(want.detach().square().mean().sqrt())
    error, worst = float(difference.square().mean().sqrt()), float(difference.abs().max())
    assert error <= tolerance * size, f"{name}: RMS error {error:.3g} of {size:.3g}, ratio {error / (size or 1):.3g}"
    assert worst <= 100 * tolerance * size, f"{name}: worst error {worst:.3g} where RMS is {size:.3g}"


def assert_routed(layer: Layer, leaves: Tensor, dtype: torch.dtype) -> None:
    """Every node on the taken paths decided as the reference does, wherever that is clear."""
    exact, spec = layer.exact(), layer.case.spec
    assert leaves.dtype == torch.int32
    assert leaves.shape == (layer.case.tokens, spec.trees)
    if spec.depth == 0 or layer.case.tokens == 0:
        assert not leaves.any()
        return
    taken = leaves.long().cpu()
    assert int(taken.min()) >= 0
    assert int(taken.max()) < spec.leaves
    nodes = reference.path_nodes(taken, spec.depth)
    w = exact.w_in[:, : spec.nodes]
    z = torch.einsum("nd,kmd->nkm", exact.x, w)
    size = exact.x.norm(dim=-1)[:, None, None] * w.norm(dim=-1)
    if exact.b is not None:
        z, size = z + exact.b[:, : spec.nodes], size + exact.b[:, : spec.nodes].abs()
    if exact.thresholds is not None:
        z = z - exact.thresholds
    margin, size = z.gather(2, nodes), size.gather(2, nodes)
    went_right = (taken[..., None] >> torch.arange(spec.depth - 1, -1, -1)) & 1 == 1
    wrong = (went_right != (margin > 0)) & (margin.abs() > EPSILON[dtype] * size)
    assert not wrong.any(), (
        f"{int(wrong.sum())} decisions differ from the reference, margin {margin[wrong].abs().max()}"
    )


def check(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """The whole comparison of one case: routes, then output, responses and every gradient on that path."""
    layer = Layer.of(case, dtype, device)
    free, free_grads = layer.call(backend)
    assert_routed(layer, free.leaves, dtype)
    other = torch.randint(case.spec.leaves, free.leaves.shape, generator=torch.Generator().manual_seed(case.seed))
    for label, given in (("routed", free.leaves), ("given", other.int().to(device))):
        out, grads = (free, free_grads) if label == "routed" else layer.call(backend, given)
        want, want_grads = layer.exact().call("reference", given.cpu())
        assert torch.equal(out.leaves, given)
        assert out.y.dtype == dtype
        assert out.responses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not out.responses.requires_grad
        assert_close(f"{label} y", out.y, want.y, TOLERANCE[dtype])
        assert_close(f"{label} responses", out.responses, want.responses, min(TOLERANCE[dtype], 1e-5))
        for name in want_grads:
            assert_close(f"{label} gradient of {name}", grads[name], want_grads[name], TOLERANCE[dtype])
            assert grads[name].dtype == dtype


class BackendContract:
    """Subclass this and set the class variables; every method is a test of that backend."""

    backend: ClassVar[str]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    cases: ClassVar[tuple[Case, ...]] = CASES

    def test_agrees_with_the_reference(self, case: Case, dtype: torch.dtype) -> None:
        check(case, self.backend, dtype, self.device)

    def test_given_the_leaves_it_chose_it_does_the_same(self, dtype: torch.dtype) -> None:
        layer = Layer.of(replace(CASES[0], thresholds=True), dtype, self.device)
        free, grads = layer.call(self.backend)
        again, again_grads = layer.call(self.backend, free.leaves)
        assert torch.equal(free.leaves, again.leaves)
        assert_close("y", again.y, free.y.double().cpu(), TOLERANCE[dtype])
        for name, grad in grads.items():
            assert_close(name, again_grads[name], grad.double().cpu(), TOLERANCE[dtype])

    def test_route_is_the_forward_without_outputs(self, dtype: torch.dtype) -> None:
        layer = Layer.of(replace(CASES[0], thresholds=True), dtype, self.device)
        out, _ = layer.call(self.backend)
        leaves, z = route(
            layer.x, layer.w_in, layer.b, layer.case.spec, thresholds=layer.thresholds, backend=self.backend
        )
        assert torch.equal(leaves, out.leaves)
        assert_close("node responses", z, out.responses[..., : layer.case.spec.depth].double().cpu(), 1e-5)

    def test_rows_no_token_reached_have_zero_gradient(self, dtype: torch.dtype) -> None:
        layer = Layer.of(replace(CASES[0], tokens=5), dtype, self.device)
        out, grads = layer.call(self.backend)
        spec = layer.case.spec
        reached = torch.zeros(spec.trees, spec.in_rows, dtype=torch.bool)
        rows = reference.path_rows(out.leaves.cpu(), spec)
        for k in range(spec.trees):
            reached[k, rows[:, k].flatten()] = True
        for name in ("w_in", "b", "w_out"):
            per_row = grads[name].cpu().reshape(spec.trees, spec.in_rows, -1)
            assert not per_row[~reached].any(), name
            assert per_row[reached].any(dim=-1).all(), name

    def test_node_rows_are_frozen_without_node_output(self, dtype: torch.dtype) -> None:
        layer = Layer.of(replace(CASES[0], spec=tree(node_output=False)), dtype, self.device)
        _, grads = layer.call(self.backend)
        assert not grads["w_in"][:, : layer.case.spec.nodes].any()
        assert not grads["b"][:, : layer.case.spec.nodes].any()

    def test_repeats_bitwise(self, dtype: torch.dtype) -> None:
        layer = Layer.of(replace(CASES[0], tokens=150), dtype, self.device)
        first, first_grads = layer.call(self.backend)
        for _ in range(3):
            again, grads = layer.call(self.backend)
            assert torch.equal(first.y, again.y)
            assert torch.equal(first.leaves, again.leaves)
            assert torch.equal(first.responses, again.responses)
            for name in grads:
                assert torch.equal(first_grads[name], grads[name]), name

    def test_gradients_accumulate(self, dtype: torch.dtype) -> None:
        """Three micro-batches into .grad: no buffer of an earlier call may be reused."""
        layers = [Layer.of(replace(CASES[0], seed=s), dtype, self.device) for s in range(3)]
        w_in, b, w_out = (
            t.detach().requires_grad_() for t in (layers[0].w_in, layers[0].b, layers[0].w_out) if t is not None
        )
        parts = []
        for layer in layers:
            step = replace(layer, w_in=w_in, b=b, w_out=w_out)
            parts.append(step.call(self.backend)[1])
            out = tree_feedforward(step.x, w_in, b, w_out, layer.case.spec, backend=self.backend)
            torch.autograd.backward(out.y, step.gy)
        for name, weight in zip(("w_in", "b", "w_out"), (w_in, b, w_out), strict=True):
            assert weight.grad is not None
            total = sum((p[name].double() for p in parts), torch.zeros_like(weight, dtype=torch.float64)).cpu()
            assert_close(name, weight.grad, total, TOLERANCE[dtype])

    @pytest.mark.parametrize("wants", [("x",), ("w_in",), ("b",), ("w_out",), ("x", "w_out"), ("w_in", "b")])
    def test_any_subset_of_gradients(self, wants: tuple[str, ...], dtype: torch.dtype) -> None:
        for placement in ("unit", "tree"):
            layer = Layer.of(replace(CASES[0], spec=tree(placement=placement)), dtype, self.device)
            _, every = layer.call(self.backend)
            _, some = replace(layer, wants=wants).call(self.backend)
            assert tuple(some) == wants
            for name in wants:
                assert torch.equal(some[name], every[name]), name
