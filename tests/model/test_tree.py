from __future__ import annotations

from typing import Any

import pytest
import torch

from ablate import TreeFeedForward
from ablate.config import ConfigError, Trial
from ablate.kernels.op import tree_feedforward
from ablate.kernels.spec import Placement, TreeSpec
from ablate.model import init
from ablate.model.counts import count
from ablate.model.transformer import Transformer


def tokens_like_layer_inputs(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Unit-variance tokens with a common mean, as a layer behind a norm sees them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) + 0.7 * torch.randn(d, generator=generator)
    return x / x.square().mean(-1, keepdim=True).sqrt()


def test_identity_makes_the_placements_one_model() -> None:
    x = tokens_like_layer_inputs(100, 16)
    outputs = []
    placements: tuple[Placement, ...] = ("unit", "tree", "sum")
    for placement in placements:
        torch.manual_seed(3)
        layer = TreeFeedForward(16, trees=2, depth=3, leaf_width=2, mirror=-1, placement=placement)
        outputs.append(layer(x))
        direct = tree_feedforward(
            x, layer.w_in, layer.b, layer.w_out,
            TreeSpec(trees=2, depth=3, leaf_width=2, mirror=-1, node_mirror=-1, placement=placement),
            backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(direct.y, outputs[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_centred_routing_balances_without_touching_the_loss() -> None:
    x = tokens_like_layer_inputs(4096, 32)

    def imbalance(layer: TreeFeedForward) -> float:
        layer(x)
        assert layer.last_leaves is not None
        counts = torch.bincount(layer.last_leaves[:, 0].long(), minlength=16).float()
        return float(counts.max() / counts.mean())

    layer = TreeFeedForward(
        32, trees=1, depth=4, leaf_width=1, routing="centred", generator=torch.Generator().manual_seed(1)
    )
    layer.eval()
    before, weights = imbalance(layer), layer.w_in.clone()
    layer.train()
    for _ in range(100):
        layer(x)
        layer.finish_step()
    layer.eval()
    frozen = layer.thresholds.clone()
    after = imbalance(layer)
    assert torch.equal(weights, layer.w_in)
    assert after < 1.5 < before
    layer.finish_step()  # nothing was seen in eval mode
    assert torch.equal(frozen, layer.thresholds)


def test_centred_routing_sums_micro_batches_and_ignores_recomputation() -> None:
    x = tokens_like_layer_inputs(512, 16)

    def trained(parts: int, recompute: bool) -> TreeFeedForward:
        layer = TreeFeedForward(
            16, trees=2, depth=3, leaf_width=2, routing="centred", router_input="centred",
            generator=torch.Generator().manual_seed(0), backend="reference",
        )  # fmt: skip
        for part in x.chunk(parts):
            part = part.clone().requires_grad_()
            y = torch.utils.checkpoint.checkpoint(layer, part, use_reentrant=False) if recompute else layer(part)
            y.sum().backward()
        layer.finish_step()
        return layer

    whole, split, again = trained(1, False), trained(4, False), trained(1, True)
    assert whole.thresholds.abs().max() > 0
    torch.testing.assert_close(whole.thresholds, split.thresholds)
    torch.testing.assert_close(whole.input_mean, split.input_mean)
    assert torch.equal(whole.thresholds, again.thresholds)
    assert torch.equal(whole.input_mean, again.input_mean)


def test_nodes_that_few_tokens_reach_keep_their_threshold() -> None:
    layer = TreeFeedForward(8, trees=1, depth=3, leaf_width=1, routing="centred")
    layer(tokens_like_layer_inputs(3, 8))
    layer.finish_step()
    assert torch.equal(layer.thresholds, torch.zeros_like(layer.thresholds))


def test_centred_router_input_decides_by_x_minus_its_mean() -> None:
    layer = TreeFeedForward(16, trees=2, depth=4, leaf_width=1, router_input="centred").eval()
    x = tokens_like_layer_inputs(300, 16)
    layer.calibrate(x)
    layer(x)
    taken = layer.last_leaves
    shifted = TreeFeedForward(16, trees=2, depth=4, leaf_width=1)
    shifted.load_state_dict(layer.state_dict())
    shifted.eval()(x - layer.input_mean)
    assert shifted.last_leaves is not None
    assert taken is not None
    # The two differ by rounding only where a response sits on its threshold.
    assert (taken != shifted.last_leaves).float().mean() < 0.01


def test_frozen_router_keeps_its_routes_while_nodes_learn() -> None:
    layer = TreeFeedForward(16, trees=2, depth=3, leaf_width=2, router="frozen")
    x = tokens_like_layer_inputs(200, 16)
    layer(x).square().sum().backward()
    before = layer.last_leaves
    assert layer.w_in.grad is not None
    assert layer.w_in.grad[:, :7].abs().sum() > 0
    with torch.no_grad():
        layer.w_in.sub_(layer.w_in.grad)
    layer(x)
    assert before is not None
    assert layer.last_leaves is not None
    assert torch.equal(before, layer.last_leaves)


def test_orthogonal_init() -> None:
    mean = torch.randn(24, dtype=torch.float64)
    w = init.orthogonal_nodes(2, 4, mean, torch.Generator().manual_seed(0))
    for leaf in range(16):
        path = [((leaf + 16) >> (4 - level)) - 1 for level in range(4)]
        gram = w[:, path] @ w[:, path].transpose(1, 2) * 3
        torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64).expand(2, 4, 4), rtol=0, atol=1e-10)
    assert (w @ mean).abs().max() < 1e-10
    with pytest.raises(ConfigError, match="d_model of at least 5"):
        init.orthogonal_nodes(1, 4, torch.zeros(4), torch.Generator())


def test_median_split_halves_every_node() -> None:
    x = tokens_like_layer_inputs(64 * 16, 24)
    layer = TreeFeedForward(24, trees=2, depth=4, leaf_width=1, init="median_split")
    layer.calibrate(x)
    layer(x)
    assert layer.last_leaves is not None
    for tree in range(2):
        counts = torch.bincount(layer.last_leaves[:, tree].long(), minlength=16)
        assert counts.min() >= 62
        assert counts.max() <= 66
    with pytest.raises(ConfigError, match="at least 1024 tokens, got 1000"):
        layer.calibrate(x[:1000])


def test_zero_bias_and_uniform_ranges() -> None:
    layer = TreeFeedForward(64, trees=2, depth=3, leaf_width=2, init="zero_bias")
    assert layer.b is not None
    assert layer.b.abs().max() == 0
    assert 0.9 / 8 < layer.w_in.abs().max() <= 1 / 8
    assert 0.9 / 10**0.5 < layer.w_out.abs().max() <= 1 / 10**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "tanh", "mirror": 0.5}, "tree: mirror is 0.5: activation 'tanh' takes mirror 0 only"),
        ({"placement": "sum", "node_mirror": 1.0}, "node_mirror is 1.0: apart from mirror it needs placement 'unit'"),
        ({"leaf_widht": 3}, "tree.leaf_widht: unknown setting; allowed here: trees, depth, leaf_width"),
        ({"depth": 15}, "tree.depth is 15: input should be less than or equal to 14"),
        ({"bias": False, "init": "median_split"}, "init is 'median_split': it needs bias on"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TreeFeedForward(16, **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("feedforward", ["tree", "dense", "none"])
@pytest.mark.parametrize("node_output", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_counts_equal_the_built_model(feedforward: str, node_output: bool, bias: bool) -> None:
    trial = Trial.model_validate(
        {
            "model": {"feedforward": feedforward, "d_model": 32, "blocks": 3, "heads": 2},
            "tree": {"node_output": node_output, "bias": bias, "trees": 3, "depth": 4, "leaf_width": 3},
            "dense": {"width": 77, "bias": bias},
        }
    )
    with torch.device("meta"):
        model = Transformer(trial, 300)
    cost = count(trial, 300)
    assert cost.total_params == sum(p.numel() for p in model.parameters())
    if feedforward == "tree":
        x = torch.randn(1, 32)
        layer = TreeFeedForward(32, trial.tree, backend="reference")
        layer(x).sum().backward()
        touched = sum(int((p.grad != 0).any(-1).sum()) for p in (layer.w_in, layer.w_out) if p.grad is not None)
        read_only = 0 if node_output else 3 * 4  # node rows that route without contributing get no gradient
        bias_rows = (4 + 3) * 3 * bias
        assert cost.active_params - count(
            Trial(model=trial.model.model_copy(update={"feedforward": "none"})), 300
        ).total_params == 3 * ((touched + read_only) * 32 + bias_rows + 32)


def test_presets_are_the_sizes_they_claim() -> None:
    from ablate.config import PRESETS

    dense = Trial.model_validate(
        {
            **PRESETS["gpt2-small"],
            "model": {**PRESETS["gpt2-small"]["model"], "feedforward": "dense"},
        }
    )
    tree = Trial.model_validate(PRESETS["gpt2-small"])
    assert 123e6 < count(dense, 50257).total_params < 125e6
    assert abs(count(tree, 50257).total_params / count(dense, 50257).total_params - 1) < 0.01
    assert count(tree, 50257).active_frac < 0.05


def test_same_seed_same_model_and_attention_does_not_depend_on_the_feedforward() -> None:
    tree = Transformer(Trial(init_seed=5), 300).state_dict()
    assert all(torch.equal(v, tree[k]) for k, v in Transformer(Trial(init_seed=5), 300).state_dict().items())
    dense = Transformer(Trial.model_validate({"init_seed": 5, "model": {"feedforward": "dense"}}), 300).state_dict()
    assert torch.equal(tree["blocks.2.attention.qkv"], dense["blocks.2.attention.qkv"])
    assert not torch.equal(tree["embedding"], Transformer(Trial(init_seed=6), 300).state_dict()["embedding"])


def test_no_position_sees_a_later_token() -> None:
    model = Transformer(Trial.model_validate({"model": {"d_model": 32, "blocks": 2, "heads": 2}}), 300).eval()
    ids = torch.randint(0, 300, (2, 20))
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 300
    torch.testing.assert_close(model(ids)[:, :12], model(changed)[:, :12])
    assert not torch.allclose(model(ids)[:, 12:], model(changed)[:, 12:])
