"""The batches of a training run, a pure function of seed and step, and the fixed slice it is evaluated on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ablate.data.tokens import Prepared
from ablate.data.windows import Batch, DataOrder, evaluation_starts, read


class _TrainBatches(IterableDataset[Batch]):
    def __init__(self, data: TokenData, rank: int, world_size: int) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        data = self.data
        for step in range(data.start_step, data.steps):
            place = (step * self.world_size + self.rank) * data.batch_size
            starts = data.order.starts(place, data.batch_size)
            yield {"tokens": read(data.prepared.train, starts, data.context)}


class _ValidationBatches(IterableDataset[Batch]):
    def __init__(self, windows: Tensor, batch_size: int) -> None:
        self.windows, self.batch_size = windows, batch_size

    def __iter__(self) -> Iterator[Batch]:
        for tokens in torch.split(self.windows, self.batch_size):
            yield {"tokens": tokens}


class TokenData(LightningDataModule):
    """Training batches and the fixed evaluation slice of a prepared corpus.

    Args:
        prepared: the corpus.
        context: T, tokens a window predicts.
        batch_size: windows a process takes in one micro-step.
        data_seed: fixes the order of the training windows, and nothing else does.
        steps: micro-steps of the whole run (optimizer steps x accumulated micro-batches).
        start_step: micro-steps that are done already; the batches that follow are those of an uninterrupted run.
        eval_tokens: held-out tokens wanted; `evaluated_tokens` says how many there are.
        eval_batch_size: windows in one evaluation batch.
        rank, world_size: place among the processes; of the trainer where not given, else 0 of 1. Training batches are
            interleaved so that all processes' micro-batches of an optimizer step are one global batch, the same for any
            number of processes and micro-batches. Of the evaluation windows each process takes every world_size-th: sum
            over processes before dividing.

    Raises ConfigError where the training or the validation split is shorter than one window of context + 1 tokens.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        context: int,
        batch_size: int,
        data_seed: int,
        steps: int,
        start_step: int = 0,
        eval_tokens: int,
        eval_batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.prepared = prepared
        self.context = context
        self.batch_size = batch_size
        self.steps, self.start_step = steps, start_step
        self.eval_batch_size = eval_batch_size
        self.order = DataOrder(len(prepared.train), context, data_seed)
        self._rank, self._world_size = rank, world_size
        self._eval_starts = evaluation_starts(len(prepared.validation), context, eval_tokens)
        self._windows: Tensor | None = None

    @property
    def evaluated_tokens(self) -> int:
        """Predicted tokens of the evaluation slice: whole windows, as many as wanted or as validation has."""
        return len(self._eval_starts) * self.context

    @property
    def probe_windows(self) -> Tensor:
        """All windows of the evaluation slice, the same for every run on this corpus: int64 [windows, context + 1]."""
        if self._windows is None:
            self._windows = read(self.prepared.validation, self._eval_starts, self.context)
        return self._windows

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of micro-steps start_step … steps - 1 of this process."""
        # A generator of its own: a loader draws a seed when iterated, and must not advance the run's random state.
        return DataLoader(_TrainBatches(self, *self._place()), batch_size=None, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[Batch]:
        """This process's part of the evaluation slice, in the order of the text."""
        rank, world_size = self._place()
        windows = self.probe_windows[rank::world_size]
        return DataLoader(
            _ValidationBatches(windows, self.eval_batch_size), batch_size=None, generator=torch.Generator()
        )

    def _place(self) -> tuple[int, int]:
        if self._rank is not None and self._world_size is not None:
            return self._rank, self._world_size
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return 0, 1
