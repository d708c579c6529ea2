"""`size`: counts against built models, memory against a measured peak, and the 1.3B layer taking a real step."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from ablate.config import PRESETS, ConfigError, Trial, parse
from ablate.model.counts import count
from ablate.model.size import Size, describe, on_meta, size, step_memory
from ablate.model.transformer import Transformer
from ablate.model.tree import TreeFeedForward


def preset(name: str, **sections: dict[str, Any]) -> Trial:
    merged = {k: {**PRESETS[name].get(k, {}), **sections.get(k, {})} for k in PRESETS[name].keys() | sections.keys()}
    return parse(Trial, merged)


def micro(trial: Trial) -> int:
    return trial.train.batch_size // trial.train.accumulate


# --- parameters


@pytest.mark.parametrize("feedforward", ["tree", "dense", "none"])
@pytest.mark.parametrize("name", list(PRESETS))
def test_parameters_on_meta_are_those_of_the_formula(name: str, feedforward: str) -> None:
    trial = preset(name, model={"feedforward": feedforward})
    model = on_meta(trial, trial.corpus.vocab_size)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == count(trial, trial.corpus.vocab_size).total_params


@pytest.mark.parametrize(
    "tree",
    [{}, {"node_output": False, "bias": False}, {"init": "orthogonal", "router": "frozen", "routing": "centred"}],
    ids=["default", "routing-nodes", "data-dependent"],
)
def test_parameters_on_meta_are_those_of_the_real_model(tree: dict[str, Any]) -> None:
    trial = preset("nano", tree=tree)
    counted = sum(p.numel() for p in on_meta(trial, 2048).parameters())
    assert counted == sum(p.numel() for p in Transformer(trial, 2048).parameters())


@pytest.mark.parametrize(("name", "vocabulary"), [("opt-1.3b", 50272), ("gpt-1.3b", 50257)])
def test_the_billion_presets_have_the_published_shape(name: str, vocabulary: int) -> None:
    trial = preset(name)
    assert (trial.model.blocks, trial.model.d_model, trial.model.context) == (24, 2048, 2048)
    found = count(trial, trial.corpus.vocab_size)
    assert trial.corpus.vocab_size == vocabulary
    assert 1.30e9 < found.total_params < 1.32e9
    assert 8100 <= found.total_units <= 8192  # as many as 2^D leaves allow, at most those of the dense MLP
    assert found.active_frac < 0.05
    assert trial.train.batch_size * trial.model.context == 2**20


# --- memory


def measured(trial: Trial, vocabulary: int) -> int:
    # Big tensors go back to the system when they are freed, so that resident memory is what is alive.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "tests.model.peak", trial.model_dump_json(), str(vocabulary), str(micro(trial))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=900)
    return int(done.stdout)


def estimated(trial: Trial, vocabulary: int) -> int:
    again = trial.train.activation_checkpointing
    return step_memory(trial, vocabulary, sequences=micro(trial), checkpointing=again, precision="fp32").peak


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "sections"),
    [
        pytest.param("nano", {}, id="nano"),
        pytest.param("nano", {"train": {"activation_checkpointing": True}}, id="nano-ck", marks=pytest.mark.soak),
        pytest.param("nano", {"train": {"accumulate": 2}}, id="nano-accumulate", marks=pytest.mark.soak),
        pytest.param("nano", {"model": {"feedforward": "dense"}}, id="nano-dense", marks=pytest.mark.soak),
        pytest.param("small", {}, id="small", marks=pytest.mark.soak),
        pytest.param("small", {"train": {"activation_checkpointing": True}}, id="small-ck", marks=pytest.mark.soak),
    ],
)
def test_the_memory_estimate_is_within_a_tenth_of_the_measured_peak(name: str, sections: dict[str, Any]) -> None:
    trial = preset(name, **sections)
    found, expected = measured(trial, 2048), estimated(trial, 2048)
    print(
        f"\n{name} {sections}: measured {found / 1e6:.1f} MB, estimated {expected / 1e6:.1f} MB, {expected / found:.3f}"
    )
    assert 0.9 < expected / found < 1.1


def step(trial: Trial, **settings: Any) -> Any:
    return step_memory(trial, 512, **{"sequences": 4, "checkpointing": False, "precision": "fp32", **settings})


TINY: dict[str, Any] = {
    "model": {"d_model": 64, "blocks": 2, "heads": 2, "context": 64},
    "tree": {"trees": 2, "depth": 3, "leaf_width": 2},
    "train": {"batch_size": 64, "accumulate": 8, "eval_tokens": 4096},
    "corpus": {"vocab_size": 512},
}


def test_the_parts_are_those_of_mixed_precision_adam() -> None:
    trial = Trial.model_validate(TINY)
    elements = sum(p.numel() for p in on_meta(trial, 512).parameters())
    full, half = step(trial), step(trial, precision="bf16")
    for found in (full, half):  # bf16 is computed in; weights, gradients and moments stay float32
        assert found.parameters == found.gradients == 4 * elements
        # Two moments, and a step counter of 4 bytes a tensor.
        assert 0 <= found.optimizer - 8 * elements < 4 * 100
        states = found.parameters + found.gradients + found.optimizer
        assert found.peak <= states + found.activations
    assert step(trial, precision="bf16", cast=False).parameters == 2 * elements
    assert half.activations < full.activations
    assert step(trial, checkpointing=True).activations < 0.6 * full.activations
    assert step(trial, sequences=8).activations == pytest.approx(2 * full.activations, rel=0.05)


@pytest.fixture(scope="module")
def found() -> Size:
    return size(Trial.model_validate(TINY), gpus=[1, 2, 8, 64], tokens_per_second=1000)


def test_memory_per_device_as_devices_are_added(found: Size) -> None:
    rows = found.devices
    assert [r.gpus for r in rows] == [1, 2, 8, 64]
    assert [r.sequences for r in rows] == [8, 8, 8, 1]
    assert all(r.ddp_checkpointed < r.ddp and r.fsdp_checkpointed < r.fsdp for r in rows)
    assert all(a.fsdp > b.fsdp for a, b in itertools.pairwise(rows))
    assert rows[0].ddp == rows[0].fsdp
    gradients = 4 * found.meta_params
    assert rows[1].ddp - rows[0].ddp == gradients
    assert rows[1].ddp == rows[2].ddp > rows[3].ddp
    assert [r.tokens_per_day for r in rows] == [86_400_000 * r.gpus for r in rows]


def test_what_is_printed_and_what_goes_into_json(found: Size) -> None:
    text = describe(found)
    assert f"{found.cost.total_params:,}" in text
    assert len([line for line in text.splitlines() if line.split()[:1] in [[str(r.gpus)] for r in found.devices]]) == 4
    assert "1000 tokens/s a device as stated" in text
    assert Size.model_validate_json(found.model_dump_json()) == found
    silent = size(Trial.model_validate(TINY), gpus=[1])
    assert silent.devices[0].tokens_per_day is None
    assert "needs a stated throughput" in describe(silent)
    assert found.meta_params == found.cost.total_params
    assert found.training_flops_per_token == 3 * found.cost.flops_per_token
    assert size(Trial.model_validate(TINY), gpus=[1, 128]).devices[-1].gpus == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_second": 0}, "tokens_per_second is 0: it must be above 0"),
        ({"gpus": [0, 1]}, r"gpus is \[0, 1\]: counts of 1 and more"),
        ({"gpus": []}, r"gpus is \[\]: counts of 1 and more"),
    ],
)
def test_impossible_questions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        size(Trial.model_validate(TINY), **settings)


# --- 1.3B


@pytest.mark.soak
@pytest.mark.parametrize("name", ["opt-1.3b", "gpt-1.3b"])
def test_the_size_of_the_billion_presets(name: str) -> None:
    found = size(preset(name), tokens_per_second=20000)
    print(f"\n{name}\n{describe(found)}")
    assert found.meta_params == found.cost.total_params
    # Float32 weights, gradients and two moments of 1.3 billion parameters are 19.5 GiB; nothing here can be less.
    assert all(r.ddp_checkpointed > 16 * found.meta_params for r in found.devices)
    assert found.devices[-1].fsdp_checkpointed < 16 * found.meta_params


def test_one_layer_of_the_billion_model_takes_a_step_on_both_routes() -> None:
    tree = preset("gpt-1.3b").tree
    backends: tuple[str, ...] = ("auto", "reference")
    results = []
    for backend in backends:
        layer = TreeFeedForward(2048, tree, backend=backend, generator=torch.Generator().manual_seed(0))
        assert sum(p.numel() for p in layer.parameters()) == 8184 * (2 * 2048 + 1)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(1)
        x, target = (torch.randn(96, 2048, generator=generator) for _ in range(2))
        losses = []
        for _ in range(2):
            loss = (layer(x) - target).square().mean()
            torch.autograd.backward(loss)
            losses.append(loss.item())
            gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        assert losses[1] < losses[0]
        assert layer.last_leaves is not None
        results.append((losses, gradients, layer.last_leaves))
    (losses, gradients, leaves), (expected, wanted, taken) = results
    assert losses == pytest.approx(expected, rel=1e-5)
    # A token whose response at some node is all but 0 may fall either way; none does in this batch.
    assert torch.equal(leaves, taken)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-8)
