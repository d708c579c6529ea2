"""Activation checkpointing changes memory and time, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.config import Trial
from ablate.model.transformer import Transformer


def built(checkpointing: bool, **train: Any) -> Transformer:
    trial = Trial.model_validate(
        {
            "model": {"d_model": 32, "blocks": 2, "heads": 2, "context": 16},
            "tree": {"trees": 2, "depth": 3, "leaf_width": 2, "routing": "centred", "router_input": "centred"},
            "train": {"activation_checkpointing": checkpointing, "eval_tokens": 512, **train},
        }
    )
    return Transformer(trial, 64)


def gradients(model: Transformer, tokens: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_and_statistics_are_the_same_bit_for_bit(backend: str) -> None:
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    plain, again = built(False, backend=backend), built(True, backend=backend)
    for one, other in zip(gradients(plain, tokens), gradients(again, tokens), strict=True):
        assert torch.equal(one, other)
    for first, second in zip(plain.trees(), again.trees(), strict=True):
        # Each token is counted once, though each was computed twice.
        assert second.step_sums()[0][1][0, :, 0].tolist() == [64.0, 64.0]
        first.finish_step()
        second.finish_step()
        assert torch.equal(first.thresholds, second.thresholds)
        assert torch.equal(first.input_mean, second.input_mean)


def test_blocks_are_computed_again_in_training_only() -> None:
    calls = []
    model = built(True)
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.zeros(1, 17, dtype=torch.int64)
    gradients(model, tokens)
    assert len(calls) == 2
    model.eval()
    gradients(model, tokens)
    assert len(calls) == 3
    model.train()
    with torch.no_grad():
        model(tokens[:, :-1])
    assert len(calls) == 4
