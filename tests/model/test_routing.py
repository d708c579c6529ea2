"""Every routing setting with every other one, trained and not: what the layer reports is what it did."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ablate import TreeFeedForward
from ablate.config import Tree
from ablate.kernels.reference import path_nodes, walk
from ablate.model.routing import ROUTER_INPUT, ROUTING

SETTINGS: list[dict[str, Any]] = [
    {"routing": routing, "router_input": router_input, "router": router}
    for routing, router_input, router in itertools.product(ROUTING, ROUTER_INPUT, ["tied", "frozen"])
]
DEPTH, NODES, D = 3, 7, 16


def built(seed: int = 0, **settings: Any) -> TreeFeedForward:
    generator = torch.Generator().manual_seed(seed)
    layer = TreeFeedForward(D, trees=2, depth=DEPTH, leaf_width=2, generator=generator, **settings)
    with torch.no_grad():  # as after training: the nodes' rows have moved away from a frozen router's
        layer.w_in.add_(0.05 * torch.randn(layer.w_in.shape, generator=generator))
        layer.thresholds.add_(0.1 * torch.randn(layer.thresholds.shape, generator=generator))
        layer.input_mean.add_(0.3 * torch.randn(D, generator=generator))
    return layer


def inputs(n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) + 0.5 * torch.randn(D, generator=generator)


def test_settings_and_rules_have_the_same_names() -> None:
    assert list(get_args(Tree.model_fields["routing"].annotation)) == list(ROUTING)
    assert list(get_args(Tree.model_fields["router_input"].annotation)) == list(ROUTER_INPUT)


@pytest.mark.parametrize("leak", [0.0, 0.2])
@pytest.mark.parametrize("load_loss", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
def test_decisions_are_those_of_the_router(settings: dict[str, Any], leak: float, load_loss: bool) -> None:
    layer = built(**settings)
    layer.region_leak, layer.load_loss = leak, load_loss
    layer(inputs(50, seed=2))  # what an earlier batch left must not come back
    x = inputs(400)
    layer(x)
    w, b = layer.router()
    assert b is not None
    z = torch.einsum("nd,kmd->nkm", x, w) + b
    leaves, decisions = layer.last_leaves, layer.last_decisions
    assert leaves is not None
    assert decisions is not None
    torch.testing.assert_close(decisions, z.gather(2, path_nodes(leaves, DEPTH)).detach(), rtol=1e-4, atol=1e-5)
    if leak == 0:
        taken = walk(z, layer.effective_thresholds(), DEPTH)
        assert (taken != leaves).float().mean() < 0.01  # rounding, where a response is on its threshold
    assert (layer.last_load_loss is not None) == load_loss
    for _, sums in layer.step_sums():
        assert sums.any()
    layer.finish_step()
    assert not any(sums.any() for _, sums in layer.step_sums())
    assert layer.thresholds.isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
def test_a_step_in_parts_moves_as_a_whole_one(settings: dict[str, Any]) -> None:
    whole, parts = built(**settings), built(**settings)
    x = inputs(512)
    whole(x)
    for part in x.chunk(4):
        parts(part)
    for layer in (whole, parts):
        layer.finish_step()
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(buffer, parts.get_buffer(name))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
def test_without_tokens_nothing_moves(settings: dict[str, Any]) -> None:
    layer = built(**settings)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.finish_step()
    layer.eval()(inputs(100))
    layer.finish_step()
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])


def test_settings_that_need_no_tokens_keep_no_sums() -> None:
    assert built(routing="sign", router_input="raw").step_sums() == []
    assert len(built(routing="centred", router_input="centred").step_sums()) == 2
