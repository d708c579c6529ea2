"""The mixture of experts: each token through one expert, as a plain loop says, and a loss that is least when balanced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ablate.config import ConfigError, Corpus, Mixture, Task, Tree, Trial
from ablate.model.convert import convert
from ablate.model.counts import count
from ablate.model.moe import MixtureFeedForward, load_loss
from ablate.model.size import size
from ablate.model.transformer import Transformer
from ablate.tasks.facts import Facts
from ablate.training.module import TrialModule

TRIAL = Trial.model_validate(
    {
        "model": {"d_model": 32, "blocks": 2, "heads": 2, "context": 32, "feedforward": "moe"},
        "moe": {"experts": 5, "width": 12},
        "train": {"load_loss": 0.01, "batch_size": 4},
        "corpus": {"vocab_size": 300},
    }
)


def layer(**settings: object) -> MixtureFeedForward:
    return MixtureFeedForward(16, Mixture.model_validate({"experts": 5, "width": 7, **settings}))


@pytest.mark.parametrize("tokens", [0, 1, 3, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_each_token_takes_its_likeliest_expert(tokens: int, bias: bool) -> None:
    torch.manual_seed(tokens)
    mixture = layer(bias=bias, activation="silu")
    x = torch.randn(tokens, 16, requires_grad=True)
    y = mixture(x)
    weights = [x, *mixture.parameters()]
    gy = torch.randn_like(y)
    got = torch.autograd.grad(y, weights, gy, allow_unused=True, retain_graph=True)
    rows = []
    for row in x:
        p = F.linear(row, mixture.router).softmax(-1)
        e = int(p.argmax())
        z = mixture.w_in[e] @ row + (0 if mixture.b is None else mixture.b[e])
        rows.append(p[e] * (F.silu(z) @ mixture.w_out[e]))
    want = torch.stack(rows) if rows else y
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(want, weights, gy, allow_unused=True)
    for mine, theirs in zip(got, expected, strict=True):
        if theirs is None or mine is None:
            assert not tokens
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_load_loss_is_one_when_balanced_and_pushes_towards_it() -> None:
    even = torch.full((6, 3), 1 / 3)
    assert load_loss(even, torch.tensor([0, 1, 2] * 2)).item() == pytest.approx(1)
    crowded = torch.tensor([[0.8, 0.1, 0.1]] * 6)
    assert load_loss(crowded, torch.zeros(6, dtype=torch.int64)).item() == pytest.approx(2.4)
    facts = TRIAL.model_copy(update={"task": Task(kind="facts", facts=40), "corpus": Corpus()})
    model = TrialModule(facts, Facts(facts, Path()))
    whole = model.training_step({"inputs": torch.arange(40)}, 0)
    plain = model.take_train_loss()
    assert plain is not None
    (added,) = [m.last_load_loss for m in model.model.mixtures()]
    assert added is not None
    assert whole.item() == pytest.approx(plain + 0.01 * added.item(), rel=1e-6)
    model.model.eval()(torch.arange(40))
    assert all(m.last_load_loss is None for m in model.model.mixtures())


def test_counts_are_those_of_the_built_model() -> None:
    model = Transformer(TRIAL, 300)
    cost = count(TRIAL, 300)
    assert cost.total_params == sum(p.numel() for p in model.parameters())
    assert (cost.total_units, cost.active_units) == (60, 12)
    one = TRIAL.model_copy(update={"moe": TRIAL.moe.model_copy(update={"experts": 6})})
    added = count(one, 300)
    # An expert more is one more row of each router, which every token touches, and weights that it does not.
    assert added.active_params - cost.active_params == 2 * 32
    assert added.flops_per_token - cost.flops_per_token == 2 * 2 * 32


def test_its_memory_is_estimated_without_numbers() -> None:
    found = size(TRIAL, gpus=[1, 2])
    assert found.meta_params == found.cost.total_params
    assert found.devices[0].ddp > 16 * found.meta_params


def test_writing_with_a_cache_equals_without() -> None:
    model = Transformer(TRIAL, 300).eval()
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model(ids)
        cache = model.cache(2)
        parts = [model(ids[:, :5], cache), *(model(ids[:, t : t + 1], cache) for t in range(5, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_it_is_not_converted() -> None:
    with pytest.raises(ConfigError, match=r"blocks\.0\.feedforward"):
        convert(Transformer(TRIAL, 300), layers="blocks.*.feedforward", tree=Tree(trees=1, depth=0, leaf_width=60))
