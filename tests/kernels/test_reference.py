"""The reference against its definition: a loop written from the design's text, a dense MLP, and numerical gradients."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels import reference
from ablate.kernels.activations import asymmetry, base, phi, phi_slope, unit_gain
from ablate.kernels.op import tree_feedforward
from ablate.kernels.spec import ACTIVATIONS, TRAITS, Activation, NodeBackward, Placement, TreeSpec, is_identity
from tests.kernels.contract import CASES, Layer, tree

MIRRORED = [(a, s) for a in ACTIVATIONS for s in ((0.0,) if TRAITS[a].odd else (0.0, -1.0, 1.0, 0.5, -0.2))]


# -- the layer, one token and one unit at a time, in Python floats ------------------------------------------------------


def scalar_base(z: float, activation: str) -> float:
    match activation:
        case "gelu":
            return z * 0.5 * math.erfc(-z / math.sqrt(2))
        case "gelu_tanh":
            return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        case "relu":
            return max(z, 0.0)
        case "relu2":
            return max(z, 0.0) * max(z, 0.0)
        case "silu":
            return z / (1 + math.exp(-z))
        case "tanh":
            return math.tanh(z)
    raise AssertionError(activation)


def scalar_layer(layer: Layer) -> tuple[list[list[float]], list[list[int]], list[list[list[float]]]]:
    """Outputs, leaves and path responses of every token, following the design's text and nothing else."""
    spec, d = layer.case.spec, layer.case.d
    x, w_in, w_out = layer.x.tolist(), layer.w_in.tolist(), layer.w_out.tolist()
    b = layer.b.tolist() if layer.b is not None else None
    t = layer.thresholds.tolist() if layer.thresholds is not None else None
    M, W = 2**spec.depth - 1, spec.leaf_width

    def response(v: list[float], k: int, row: int) -> float:
        z: float = sum(p * q for p, q in zip(v, w_in[k][row], strict=True)) + (b[k][row] if b else 0.0)
        return z

    def act(z: float, mirror: float, gain: float) -> float:
        return gain * (scalar_base(z, spec.activation) + mirror * scalar_base(-z, spec.activation))

    ys, all_leaves, all_responses = [], [], []
    for v in x:
        y, everything, leaves, responses = [0.0] * d, [0.0] * d, [], []
        for k in range(spec.trees):
            units, n = [], 0
            for _ in range(spec.depth):
                z = response(v, k, n)
                units.append((n, z, True))
                n = 2 * n + 2 if z > (t[k][n] if t else 0.0) else 2 * n + 1
            leaf = n - M
            units += [(M + leaf * W + j, response(v, k, M + leaf * W + j), False) for j in range(W)]
            leaves.append(leaf)
            responses.append([z for _, z, _ in units])
            in_tree = [0.0] * d
            for row, z, is_node in units:
                if is_node and not spec.node_output:
                    continue
                out = w_out[k][row if spec.node_output else row - M]
                if spec.placement == "unit":
                    h = act(z, spec.node_mirror, spec.node_gain) if is_node else act(z, spec.mirror, spec.leaf_gain)
                else:
                    h = z
                in_tree = [s + h * o for s, o in zip(in_tree, out, strict=True)]
            if spec.placement == "tree":
                in_tree = [act(s, spec.mirror, spec.leaf_gain) for s in in_tree]
            everything = [s + r for s, r in zip(everything, in_tree, strict=True)]
        y = [act(s, spec.mirror, spec.leaf_gain) for s in everything] if spec.placement == "sum" else everything
        ys.append(y)
        all_leaves.append(leaves)
        all_responses.append(responses)
    return ys, all_leaves, all_responses


@pytest.mark.parametrize("seed", range(50))
def test_equals_the_layer_computed_token_by_token(seed: int) -> None:
    r = random.Random(seed)
    activation: Activation = r.choice(ACTIVATIONS)
    mirrors = [0.0] if activation == "tanh" else [0.0, -1.0, 1.0, 0.5]
    placement: Placement = r.choice(get_args(Placement))
    spec = TreeSpec(
        trees=r.randint(1, 3),
        depth=r.randint(0, 4),
        leaf_width=r.randint(1, 4),
        node_output=r.random() < 0.7,
        placement=placement,
        activation=activation,
        mirror=r.choice(mirrors),
        node_mirror=r.choice(mirrors),
        node_gain=r.choice([1.0, 1.4]),
        leaf_gain=r.choice([1.0, 0.6]),
    )
    case = replace(CASES[0], tokens=6, d=r.randint(1, 9), spec=spec, bias=r.random() < 0.7, thresholds=r.random() < 0.5)
    layer = Layer.of(replace(case, seed=seed), torch.float64, "cpu")
    y, leaves, responses = scalar_layer(layer)
    out = tree_feedforward(
        layer.x, layer.w_in, layer.b, layer.w_out, spec, thresholds=layer.thresholds, backend="reference"
    )
    assert out.leaves.tolist() == leaves
    torch.testing.assert_close(out.y, torch.tensor(y, dtype=torch.float64), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.responses, torch.tensor(responses, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_depth_and_one_tree_is_a_dense_mlp(activation: Activation) -> None:
    layer = Layer.of(
        replace(CASES[0], spec=tree(trees=1, depth=0, leaf_width=7, activation=activation)), torch.float64, "cpu"
    )
    assert layer.b is not None
    out, grads = layer.call("reference")
    inputs = [t.detach().requires_grad_() for t in (layer.x, layer.w_in, layer.b, layer.w_out)]
    x, w1, b1, w2 = inputs
    y = base(F.linear(x, w1[0], b1[0]), activation) @ w2[0]
    want = torch.autograd.grad(y, inputs, layer.gy)
    torch.testing.assert_close(out.y, y)
    for name, grad in zip(("x", "w_in", "b", "w_out"), want, strict=True):
        torch.testing.assert_close(grads[name], grad)


GRADCHECKED = [
    tree(),
    tree(node_output=False),
    tree(placement="tree", activation="silu", mirror=0.5),
    tree(placement="sum", activation="tanh", leaf_gain=1.5),
    tree(depth=0),
    tree(activation="gelu_tanh", node_mirror=-0.4, node_gain=0.8),
]


@pytest.mark.parametrize("spec", GRADCHECKED, ids=lambda s: f"{s.placement}-{s.activation}-D{s.depth}-{s.node_output}")
def test_gradients_are_the_numerical_ones(spec: TreeSpec) -> None:
    layer = Layer.of(replace(CASES[0], tokens=3, d=3, spec=spec), torch.float64, "cpu")
    assert layer.b is not None
    leaves = reference.route(layer.x, layer.w_in, layer.b, None, spec)[0]
    inputs = tuple(t.detach().requires_grad_() for t in (layer.x, layer.w_in, layer.b, layer.w_out))

    def call(x: Tensor, w_in: Tensor, b: Tensor, w_out: Tensor) -> Tensor:
        return tree_feedforward(x, w_in, b, w_out, spec, leaves=leaves, backend="reference").y

    assert torch.autograd.gradcheck(call, inputs)


def test_the_three_placements_are_one_model_where_phi_is_the_identity() -> None:
    specs = [tree(placement=p, mirror=-1.0, node_mirror=-1.0) for p in get_args(Placement)]
    results = [Layer.of(replace(CASES[0], spec=s), torch.float64, "cpu").call("reference") for s in specs]
    for out, grads in results[1:]:
        torch.testing.assert_close(out.y, results[0][0].y)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name])


@pytest.mark.parametrize(("node_backward", "mirror"), [("flat", 0.0), ("flip", 0.0), ("base", -1.0), ("base", 0.5)])
def test_node_backward_changes_the_gradients_of_node_weights_alone(node_backward: NodeBackward, mirror: float) -> None:
    """Against the rule applied by hand: phi'(z) replaced for node rows of w_in and b; values and all else as before."""
    case = replace(CASES[0], spec=replace(CASES[0].spec, mirror=mirror, node_mirror=mirror))
    layer = Layer.of(case, torch.float64, "cpu")
    assert layer.b is not None
    spec, x = layer.case.spec, layer.x
    own, own_grads = layer.call("reference")
    tensors = [t.detach().requires_grad_() for t in (layer.x, layer.w_in, layer.b, layer.w_out)]
    out = tree_feedforward(
        tensors[0], tensors[1], tensors[2], tensors[3], spec, backend="reference", node_backward=node_backward
    )
    torch.testing.assert_close(out.y, own.y)
    gx, gw_in, gb, gw_out = torch.autograd.grad(out.y, tensors, layer.gy)
    torch.testing.assert_close(gx, own_grads["x"])
    torch.testing.assert_close(gw_out, own_grads["w_out"])
    torch.testing.assert_close(gw_in[:, spec.nodes :], own_grads["w_in"][:, spec.nodes :])
    z = own.responses[..., : spec.depth]
    slope, mirrored = phi_slope(z, "gelu"), phi_slope(-z, "gelu")
    instead = {"flat": (slope + mirrored) / 2, "flip": mirrored, "base": slope}[node_backward]
    nodes = reference.path_nodes(own.leaves, spec.depth)
    want_w, want_b = torch.zeros_like(layer.w_in), torch.zeros_like(layer.b)
    for n in range(layer.case.tokens):
        for k in range(spec.trees):
            for l in range(spec.depth):
                row = int(nodes[n, k, l])
                g = instead[n, k, l] * (layer.gy[n] @ layer.w_out[k, row])
                want_w[k, row] += g * x[n]
                want_b[k, row] += g
    torch.testing.assert_close(gw_in[:, : spec.nodes], want_w[:, : spec.nodes])
    torch.testing.assert_close(gb[:, : spec.nodes], want_b[:, : spec.nodes])


# -- the activation family ----------------------------------------------------------------------------------------------

Z = torch.linspace(-6, 6, 2001, dtype=torch.float64)


@pytest.mark.parametrize(("activation", "mirror"), MIRRORED)
def test_phi_is_the_base_and_its_mirror(activation: Activation, mirror: float) -> None:
    want = torch.tensor([scalar_base(z, activation) + mirror * scalar_base(-z, activation) for z in Z.tolist()])
    torch.testing.assert_close(phi(Z, activation, mirror, 1.7), 1.7 * want.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("activation", "mirror"), MIRRORED)
def test_phi_slope_is_its_derivative(activation: Activation, mirror: float) -> None:
    z = Z[Z != 0].clone().requires_grad_()
    (want,) = torch.autograd.grad(phi(z, activation, mirror, 1.7).sum(), z)
    torch.testing.assert_close(phi_slope(z.detach(), activation, mirror, 1.7), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_traits_of_an_activation_are_those_of_its_values(activation: Activation) -> None:
    traits = TRAITS[activation]
    z, odd_part = Z, base(Z, activation) - base(-Z, activation)
    assert traits.asymmetry == pytest.approx(asymmetry(activation, 0.0), abs=0.005)
    assert traits.odd == torch.allclose(base(-z, activation), -base(z, activation))
    assert traits.odd_identity == torch.allclose(odd_part, z)


def test_every_activation_has_traits() -> None:
    assert get_args(Activation) == ACTIVATIONS


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if TRAITS[a].odd_identity])
def test_mirror_minus_one_is_the_identity_bit_for_bit(activation: Activation) -> None:
    assert is_identity(activation, -1.0)
    assert torch.equal(phi(Z.float(), activation, -1.0), Z.float())
    assert torch.equal(phi_slope(Z.float(), activation, -1.0), torch.ones_like(Z.float()))


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if not TRAITS[a].odd])
def test_mirror_one_is_even_and_minus_one_is_odd(activation: Activation) -> None:
    assert torch.equal(phi(Z, activation, 1.0), phi(-Z, activation, 1.0))
    assert torch.equal(phi(Z, activation, -1.0), -phi(-Z, activation, -1.0))


def test_named_members_of_the_family() -> None:
    torch.testing.assert_close(phi(Z, "relu", -0.1), F.leaky_relu(Z, 0.1))
    torch.testing.assert_close(phi(Z, "relu2", -1.0), Z * Z.abs())
    torch.testing.assert_close(phi(Z, "relu2", 1.0), Z.square())


@pytest.mark.parametrize(("activation", "mirror"), MIRRORED)
def test_unit_gain_makes_the_second_moment_one(activation: Activation, mirror: float) -> None:
    """By a plain Riemann sum, which knows nothing of the quadrature used."""
    z = torch.linspace(-10, 10, 400_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    gain = unit_gain(activation, mirror)
    assert float((density * phi(z, activation, mirror, gain) ** 2).sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("activation", "mirror", "value"),
    [("relu", 0.0, 1.0), ("gelu", 0.0, 0.69), ("silu", 0.0, 0.59), ("tanh", 0.0, 0.0), ("gelu", 1.0, 0.0),
     ("relu2", -1.0, 0.0), ("relu", -0.1, 0.9 / 1.1), ("relu2", 0.0, 1.0)],
)  # fmt: skip
def test_asymmetry_has_the_published_values(activation: Activation, mirror: float, value: float) -> None:
    assert asymmetry(activation, mirror) == pytest.approx(value, abs=0.005)


def test_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="'swish' is not one of gelu"):
        base(Z, "swish")  # type: ignore[arg-type]
