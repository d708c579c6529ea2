"""A model with any tree settings is one graph: compiled, exported, on the meta device, copied and under autocast."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ablate import TreeFeedForward
from ablate.config import Trial, parse
from ablate.model.ragged import keep
from ablate.model.transformer import Transformer

D, TOKENS = 8, 6


def ragged(**settings: Any) -> nn.Module:
    living = np.ones((2, 4), dtype=bool)
    living[0, 1] = False
    return keep(tree(**settings), living)


def tree(load_loss: bool = False, region_leak: float = 0.0, backend: str = "auto", **settings: Any) -> TreeFeedForward:
    layer = TreeFeedForward(D, backend=backend, **{"trees": 2, "depth": 2, "leaf_width": 3, **settings})
    layer.load_loss, layer.region_leak = load_loss, region_leak
    return layer


SETTINGS: dict[str, Callable[[], nn.Module]] = {
    "plain": tree,
    "no bias": lambda: tree(bias=False),
    "depth 0": lambda: tree(depth=0),
    "nodes only route": lambda: tree(node_output=False),
    "placement tree": lambda: tree(placement="tree"),
    "placement sum": lambda: tree(placement="sum"),
    "tanh": lambda: tree(activation="tanh"),
    "mirror": lambda: tree(mirror=1.0, node_mirror=-0.5, gain="unit"),
    "routing centred": lambda: tree(routing="centred"),
    "input centred": lambda: tree(router_input="centred"),
    "both centred, frozen": lambda: tree(routing="centred", router_input="centred", router="frozen"),
    "fixed": lambda: tree(router="fixed"),
    "frozen": lambda: tree(router="frozen"),
    "frozen without bias": lambda: tree(router="frozen", bias=False),
    "separate": lambda: tree(router="separate"),
    "hash": lambda: tree(router="hash"),
    "flip": lambda: tree(node_backward="flip"),
    "flat": lambda: tree(node_backward="flat"),
    "base": lambda: tree(node_backward="base"),
    "load loss": lambda: tree(load_loss=True),
    "region leak": lambda: tree(region_leak=0.2),
    "reference": lambda: tree(backend="reference"),
    "reference, frozen": lambda: tree(backend="reference", router="frozen"),
    "ragged": ragged,
    "ragged, frozen": lambda: ragged(router="frozen"),
}


QUICK = "plain", "nodes only route", "mirror", "both centred, frozen", "hash", "flip", "load loss", "ragged, frozen"
GRAPHS = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.soak_short) for kind in SETTINGS]
"""Every setting; those that are not quick are traced in `make brief`."""


def model(kind: str) -> nn.Module:
    """The layer between two others, so that a graph has something on both of its sides."""
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(D), SETTINGS[kind](), nn.Linear(D, D))


def tokens() -> Tensor:
    return torch.randn(2, TOKENS // 2, D, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def results(net: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Outputs, every gradient and every buffer after one forward and backward pass."""
    torch.manual_seed(2)  # region leak draws
    net.zero_grad()
    x = tokens().requires_grad_()
    y = call(x)
    torch.autograd.backward(y.square().sum())
    assert x.grad is not None
    return [y.detach(), x.grad, *gradients(net), *(b.clone() for b in net.buffers())]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other), (one, other)


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("kind", GRAPHS)
def test_compiles_as_one_graph_with_the_same_values_and_gradients(kind: str) -> None:
    eager, compiled = model(kind), model(kind)
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    same(results(compiled, call), results(eager, eager))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("kind", GRAPHS)
def test_exports_with_the_same_values_and_gradients(kind: str, strict: bool) -> None:
    net = model(kind).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*assigned during export")
        exported = torch.export.export(net, (tokens(),), strict=strict)
    same(results(net, exported.module()), results(net, net))


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_forward_on_the_meta_device_gives_shapes(kind: str) -> None:
    y = model(kind).to("meta")(tokens().to("meta"))
    assert (y.shape, y.device.type) == (tokens().shape, "meta")


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_copy_after_a_step_computes_the_same(kind: str) -> None:
    net = model(kind)
    results(net, net)
    twin = copy.deepcopy(net)
    same(results(twin, twin), results(net, net))


@pytest.mark.parametrize("kind", SETTINGS)
def test_autocast_on_a_cpu_rounds_the_output_alone(kind: str) -> None:
    layer, plain = SETTINGS[kind](), SETTINGS[kind]()
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for buffer in (plain.get_buffer("thresholds"), layer.get_buffer("thresholds")):
            buffer.fill_(0.1)
        for net in (plain, layer):
            if isinstance(net, TreeFeedForward):
                net.input_mean.fill_(0.3)
    torch.manual_seed(2)
    want = plain(tokens())
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(tokens())
    assert torch.equal(got, want.bfloat16())
    for name in ("last_leaves", "last_responses"):
        assert torch.equal(vars(layer)[name], vars(plain)[name]), name


def language_model(**train: Any) -> Transformer:
    trial = parse(
        Trial,
        {
            "model": {"d_model": 16, "heads": 2, "blocks": 2, "context": 8},
            "tree": {"trees": 2, "depth": 2, "leaf_width": 2, "router": "frozen", "routing": "centred"},
            "train": train,
        },
        where="trial",
    )
    return Transformer(trial, vocab_size=11)


def loss(net: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    ids = torch.randint(0, 11, (rows, 9), generator=torch.Generator().manual_seed(rows))
    return nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def test_inductor_compiles_the_layer_too() -> None:
    eager, compiled = model("both centred, frozen"), model("both centred, frozen")
    call = torch.compile(compiled, fullgraph=True)
    for got, want in zip(results(compiled, call), results(eager, eager), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_transformer_compiles_as_one_graph_for_any_number_of_rows(checkpointed: bool) -> None:
    eager, compiled = (language_model(activation_checkpointing=checkpointed) for _ in range(2))
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=True)
    # A layer leaves its leaves behind; Dynamo asks whether a checkpoint may leave anything.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=checkpointed):
        for rows in (2, 3):
            for net, called in ((eager, eager), (compiled, call)):
                net.zero_grad()
                torch.autograd.backward(loss(called, rows))
            same(gradients(compiled), gradients(eager))
    same(list(compiled.buffers()), list(eager.buffers()))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_a_transformer_exports_for_any_number_of_rows(strict: bool) -> None:
    net = language_model().eval()
    ids = torch.randint(0, 11, (3, 8))
    shapes = ({0: torch.export.Dim("rows", min=2, max=64)},)
    exported = torch.export.export(net, (ids[:2],), dynamic_shapes=shapes, strict=strict)
    torch.testing.assert_close(exported.module()(ids), net(ids))


def test_a_checkpoint_around_a_compiled_layer_counts_each_token_once() -> None:
    layer = tree(routing="centred")
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = tokens().requires_grad_()
    checkpoint(call, x, use_reentrant=False).sum().backward()
    [(_, sums)] = layer.step_sums()
    assert int(sums[0, :, 0].sum()) == TOKENS * layer.spec.trees
