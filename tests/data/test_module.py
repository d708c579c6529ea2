"""Batches: a pure function of seed and step, parts of one global batch, and a fixed evaluation slice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ablate.config import ConfigError, Corpus
from ablate.data.module import TokenData
from ablate.data.tokens import Prepared, prepare
from ablate.data.windows import Batch, DataOrder


@pytest.fixture
def prepared(write: Callable[..., Corpus], tmp_path: Path) -> Prepared:
    return prepare(write(), tmp_path / "root")


def data(prepared: Prepared, **changes: Any) -> TokenData:
    given = {"context": 16, "batch_size": 4, "data_seed": 3, "steps": 50, "eval_tokens": 160, "eval_batch_size": 3}
    return TokenData(prepared, **{**given, **changes})


def train(prepared: Prepared, **changes: Any) -> list[Tensor]:
    return [batch["tokens"] for batch in data(prepared, **changes).train_dataloader()]


# --- order


@given(length=st.integers(9, 400), context=st.integers(2, 8), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_an_epoch_holds_each_window_of_its_grid_once_inside_the_stream(length: int, context: int, seed: int) -> None:
    order = DataOrder(length, context, seed)
    for epoch in range(3):
        starts = np.sort(order.starts(epoch * order.windows, order.windows))
        assert (np.diff(starts) == context).all()
        assert 0 <= starts[0] < context
        assert starts[-1] + context + 1 <= length
    # No grid can hold more than one window more than this.
    assert order.windows >= (length - 1) // context - 1


def test_offsets_and_orders_differ_between_epochs_and_seeds_and_all_offsets_come() -> None:
    order = DataOrder(1000, 8, 0)
    epochs = [order.starts(e * order.windows, order.windows) for e in range(200)]
    assert {int(e.min()) for e in epochs} == set(range(8))
    assert len({tuple(np.argsort(e)) for e in epochs}) == 200
    assert not np.array_equal(epochs[0], DataOrder(1000, 8, 1).starts(0, order.windows))
    # Every token but those of the two ends is a target sooner or later.
    assert {int(s) + i for e in epochs for s in e for i in range(1, 9)} == set(range(1, 1000))


def test_the_order_is_the_one_that_was_published() -> None:
    """Fixed figures: a new NumPy or a rewrite must not change what a recorded seed means."""
    assert DataOrder(1000, 8, 7).starts(121, 6).tolist() == PUBLISHED


PUBLISHED = [459, 147, 123, 501, 197, 85]  # places 121 to 126 of epochs of 124


@given(first=st.integers(0, 300), count=st.integers(1, 80))
@settings(deadline=None, max_examples=50)
def test_any_run_of_places_is_a_slice_of_the_whole_order(first: int, count: int) -> None:
    order = DataOrder(300, 7, 5)
    whole = order.starts(0, 400)
    assert order.starts(first, count).tolist() == whole[first : first + count].tolist()


def test_a_stream_of_exactly_one_window_is_used_again_and_again() -> None:
    assert DataOrder(9, 8, 0).starts(0, 5).tolist() == [0] * 5


# --- training batches


def test_batches_are_the_windows_of_the_order(prepared: Prepared) -> None:
    batches = train(prepared)
    assert len(batches) == 50
    starts = DataOrder(len(prepared.train), 16, 3).starts(0, 200)
    for step, batch in enumerate(batches):
        assert batch.dtype == torch.int64
        expected = [prepared.train[s : s + 17].astype(np.int64) for s in starts[step * 4 : step * 4 + 4]]
        assert torch.equal(batch, torch.from_numpy(np.stack(expected)))


def test_a_resumed_run_sees_what_an_uninterrupted_one_would(prepared: Prepared) -> None:
    whole = train(prepared)
    for start in (0, 1, 23, 49, 50):
        rest = train(prepared, start_step=start)
        assert len(rest) == 50 - start
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))
    longer = train(prepared, steps=80)
    assert all(torch.equal(a, b) for a, b in zip(longer, whole, strict=False))


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (4, 2)])
def test_ranks_and_micro_batches_split_the_same_global_batch(
    prepared: Prepared, world_size: int, accumulate: int
) -> None:
    whole = train(prepared, batch_size=8, steps=10)
    size = 8 // (world_size * accumulate)
    ranks = [
        train(prepared, batch_size=size, steps=10 * accumulate, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [ranks[r][step * accumulate + a] for a in range(accumulate) for r in range(world_size)]
        assert torch.equal(torch.cat(parts), batch)


def test_data_order_depends_on_the_data_seed_only(prepared: Prepared) -> None:
    first = train(prepared)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global generator is what must not matter
    assert all(torch.equal(a, b) for a, b in zip(first, train(prepared), strict=True))
    assert not torch.equal(first[0], train(prepared, data_seed=4)[0])


# --- evaluation


def evaluation(module: TokenData) -> list[Tensor]:
    return [batch["tokens"] for batch in module.val_dataloader()]


def test_evaluation_windows_are_fixed_apart_and_spread_over_validation(prepared: Prepared) -> None:
    module = data(prepared, eval_tokens=155)
    batches = evaluation(module)
    assert [len(b) for b in batches] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(batches), module.probe_windows)
    assert module.evaluated_tokens == 160
    assert torch.equal(data(prepared, data_seed=8, batch_size=2, start_step=9).probe_windows, module.probe_windows)
    stream = prepared.validation.astype(np.int64)
    starts = [i * ((len(stream) - 1) // 16) // 10 * 16 for i in range(10)]
    assert (np.diff(starts) >= 16).all()
    assert starts[-1] > 0.85 * len(stream)
    for window, start in zip(module.probe_windows, starts, strict=True):
        assert window.tolist() == stream[start : start + 17].tolist()


def test_a_validation_split_that_is_too_short_is_used_whole_and_says_so(prepared: Prepared) -> None:
    module = data(prepared, eval_tokens=10**9)
    whole = (len(prepared.validation) - 1) // 16
    assert module.evaluated_tokens == whole * 16
    assert module.evaluated_tokens > len(prepared.validation) - 17
    targets = module.probe_windows[:, 1:].flatten()
    assert targets.tolist() == prepared.validation[1 : whole * 16 + 1].tolist()


def test_ranks_share_the_evaluation_windows_out(prepared: Prepared) -> None:
    whole = data(prepared).probe_windows
    parts = [torch.cat(evaluation(data(prepared, rank=r, world_size=3))) for r in range(3)]
    for r in range(3):
        assert torch.equal(parts[r], whole[r::3])


# --- corpora shorter than a window


def test_splits_shorter_than_a_window_are_refused(prepared: Prepared) -> None:
    n = len(prepared.train)
    with pytest.raises(ConfigError) as caught:
        data(prepared, context=n)
    assert str(caught.value).startswith(
        f"model.context is {n}: the training split has {n} tokens, fewer than one window of {n + 1}"
    )
    v = len(prepared.validation)
    with pytest.raises(ConfigError, match=f"model.context is {v}: the validation split has {v} tokens"):
        data(prepared, context=v)
    assert data(prepared, context=v - 1).evaluated_tokens == v - 1


# --- in Lightning


class Recorder(lightning.LightningModule):
    """Trains one weight and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []
        self.evaluated = 0

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append(batch["tokens"].clone())
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch: Batch, index: int) -> None:
        self.evaluated += batch["tokens"][:, 1:].numel()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: TokenData, folder: Path, steps: int, resume: Path | None = None) -> Recorder:
    recorder = Recorder()
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1.0,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    trainer.fit(recorder, datamodule=module, ckpt_path=None if resume is None else str(resume), weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return recorder


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_lightning_trains_on_exactly_these_batches_and_goes_on_after_a_checkpoint(
    prepared: Prepared, tmp_path: Path
) -> None:
    whole = train(prepared, steps=12)
    once = fit(data(prepared, steps=12), tmp_path, 12)
    assert all(torch.equal(a, b) for a, b in zip(once.seen, whole, strict=True))
    assert once.evaluated == 2 * 160
    half = fit(data(prepared, steps=12), tmp_path, 7)
    rest = fit(data(prepared, steps=12, start_step=7), tmp_path, 12, tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(half.seen + rest.seen, whole, strict=True))
    assert torch.equal(rest.weight, once.weight)
