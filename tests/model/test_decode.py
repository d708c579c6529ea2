"""Generation step by step: the key-value cache and the one-token tree step against the model as it is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ablate.config import Trial
from ablate.model.decode import tree_step
from ablate.model.transformer import Transformer
from ablate.model.tree import TreeFeedForward

VOCABULARY = 53
SIZE: dict[str, dict[str, Any]] = {
    "model": {"d_model": 24, "blocks": 2, "heads": 2, "context": 20},
    "tree": {"trees": 3, "depth": 4, "leaf_width": 3},
    "train": {"eval_tokens": 2048},
}


def model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: dict[str, Any]) -> Transformer:
    sections = {name: {**SIZE.get(name, {}), **changes.get(name, {})} for name in {*SIZE, *changes}}
    built = Transformer(Trial.model_validate({**sections, "init_seed": seed}), VOCABULARY).to(dtype).eval()
    # Far larger embeddings than at initialisation, so that attention and trees see tokens that differ.
    with torch.no_grad():
        built.embedding.mul_(50)
    return built


def ids(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("feedforward", ["tree", "dense", "none"])
@pytest.mark.parametrize(
    "parts", [[20], [1] * 20, [7, 1, 1, 11], [3, 16, 1]], ids=["whole", "tokens", "mixed", "pieces"]
)
@torch.no_grad()
def test_cached_logits_equal_those_of_one_pass(feedforward: str, parts: list[int]) -> None:
    net, tokens = model(model={"feedforward": feedforward}), ids(2, 20)
    cache, pieces = net.cache(2), []
    for piece in torch.split(tokens, parts, dim=1):
        pieces.append(net(piece, cache))
    assert cache.lengths == [20, 20]
    torch.testing.assert_close(torch.cat(pieces, 1), net(tokens), rtol=0, atol=1e-11)


@pytest.mark.parametrize("norms", [("qk_norm",), ("embedding_norm",), ("qk_norm", "embedding_norm")])
@torch.no_grad()
def test_norms_without_weights_act_alike_with_and_without_a_cache(norms: tuple[str, ...]) -> None:
    net, plain, tokens = model(model=dict.fromkeys(norms, True)), model(), ids(2, 20)
    assert {n: p.shape for n, p in net.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    whole = net(tokens)
    assert not torch.allclose(whole, plain(tokens))
    cache = net.cache(2)
    pieces = [net(piece, cache) for piece in torch.split(tokens, [7, 1, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-11)
    if "embedding_norm" in norms:  # the size of a token's vector is then without meaning, but for the logits
        features = net.features(tokens)
        net.embedding.mul_(3)
        torch.testing.assert_close(net.features(tokens), features, rtol=0, atol=1e-6)
    before = net.features(tokens)
    dict(net.named_parameters())["blocks.0.attention.qkv"][: 2 * 24].mul_(3)  # queries and keys
    assert torch.allclose(net.features(tokens), before, atol=1e-6) == ("qk_norm" in norms)


@torch.no_grad()
def test_rows_of_unequal_length_each_see_their_own_past_only() -> None:
    net, tokens, lengths = model(), ids(3, 14), [9, 1, 5]
    cache = net.cache(3)
    net.features(tokens[:, :9], cache)  # what stands beyond a row's length is padding
    cache.rewind(lengths)
    steps = [net(tokens[:, 9 + i : 10 + i], cache) for i in range(2)] + [net(tokens[:, 11:14], cache)]
    got = torch.cat(steps, 1)
    for row, length in enumerate(lengths):
        alone = torch.cat([tokens[row, :length], tokens[row, 9:14]])[None]
        torch.testing.assert_close(got[row], net(alone)[0, length:], rtol=0, atol=1e-11)


@torch.no_grad()
def test_selected_rows_go_on_apart() -> None:
    net, tokens = model(), ids(2, 12)
    cache = net.cache(2, 8)
    net.features(tokens[:, :8], cache)
    cache.rewind([8, 3])
    chosen = cache.select([1, 0, 1], 12)
    ends = ids(3, 4, seed=1)
    got = net(ends, chosen)
    for row, (source, length) in enumerate([(1, 3), (0, 8), (1, 3)]):
        alone = torch.cat([tokens[source, :length], ends[row]])[None]
        torch.testing.assert_close(got[row], net(alone)[0, length:], rtol=0, atol=1e-11)
    assert cache.lengths == [8, 3]


@torch.no_grad()
def test_cache_refuses_what_does_not_fit() -> None:
    net = model()
    with pytest.raises(ValueError, match="21 positions is longer than the model's context of 20"):
        net.cache(1, 21)
    cache = net.cache(2, 10)
    net.features(ids(2, 8), cache)
    with pytest.raises(ValueError, match="3 more tokens after 8 do not fit a cache of 10"):
        net.features(ids(2, 3), cache)
    with pytest.raises(ValueError, match="1 rows of tokens for a cache of 2 rows"):
        net.features(ids(1, 1), cache)
    with pytest.raises(ValueError, match=r"cannot rewind rows of lengths \[8, 8\] to \[9, 8\]"):
        cache.rewind([9, 8])


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-nodes": {"node_output": False},
    "no-bias": {"bias": False},
    "tree-placement": {"placement": "tree"},
    "sum-placement": {"placement": "sum", "mirror": 0.3},
    "sum-no-nodes": {"placement": "sum", "node_output": False},
    "mirrors": {"mirror": 0.5, "node_mirror": -0.25, "gain": "unit"},
    "identity-nodes": {"mirror": 0.0, "node_mirror": -1.0},
    "linear": {"mirror": -1.0, "placement": "tree"},
    "gelu-tanh": {"activation": "gelu_tanh", "mirror": -0.5},
    "relu": {"activation": "relu", "mirror": -0.1},
    "relu2": {"activation": "relu2", "mirror": 1.0},
    "silu": {"activation": "silu", "mirror": 0.2},
    "tanh": {"activation": "tanh", "gain": "unit"},
    "centred": {"routing": "centred", "router_input": "centred"},
    "frozen": {"router": "frozen"},
    "frozen-centred-no-nodes": {"router": "frozen", "router_input": "centred", "node_output": False},
    "depth-0": {"depth": 0},
    "depth-0-frozen-centred": {"depth": 0, "router": "frozen", "routing": "centred"},
    "one-tree-deep": {"trees": 1, "depth": 9, "leaf_width": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_a_step_equals_the_layer(settings: dict[str, Any], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    settings = {"trees": 3, "depth": 4, "leaf_width": 5, **settings}
    layer = TreeFeedForward(37, generator=generator, **settings).to(dtype).eval()
    for name in ("thresholds", "input_mean"):
        buffer = getattr(layer, name)
        buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator, dtype=dtype))
    if layer.router_w is not None:  # as after training: the nodes' own rows have moved away from the frozen ones
        layer.w_in.add_(0.5 * torch.randn(layer.w_in.shape, generator=generator, dtype=dtype))
    x = torch.randn(3, 2, 37, generator=generator, dtype=dtype)
    layer.backend = "reference"
    expected = layer(x)
    layer.backend = "auto"
    step = tree_step(layer)
    assert step is not None
    torch.testing.assert_close(step(x), expected, rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-12)
