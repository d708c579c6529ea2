"""Next tokens of a corpus: the task that a trial has unless it names another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from ablate.balance.probe import next_token_loss, previous_tokens
from ablate.config import Trial
from ablate.config.endpoints import BPB
from ablate.data.module import TokenData
from ablate.data.stream import StreamData
from ablate.data.tokens import prepare
from ablate.data.windows import EVAL_BATCH_TOKENS
from ablate.evaluation import evaluate
from ablate.evaluation.bits_per_byte import bits_per_byte
from ablate.evaluation.scores import Score
from ablate.model.counts import Cost, count
from ablate.model.network import Network
from ablate.model.transformer import Transformer
from ablate.tasks.task import Batch, Watch, Windows

QUESTIONS = ".cache/tasks"
"""Folder of the offline questions, under the data's root."""


class Language:
    """A transformer on the tokens of a corpus, judged in bits per byte of a held-out slice.

    Raises ConfigError, before anything is trained, for a corpus or questions that cannot be used.
    """

    def __init__(self, trial: Trial, data_root: Path) -> None:
        self.trial, self._data_root = trial, data_root
        self.prepared = prepare(trial.corpus, data_root)
        evaluate.check_tasks(trial.questions, self.prepared, data_root / QUESTIONS)
        self._token_bytes = torch.from_numpy(np.asarray(self.prepared.token_bytes, dtype=np.int64))

    @property
    def card(self) -> dict[str, Any]:
        """Return the corpus's data card with its hashes."""
        return self.prepared.hashed_card

    def cost(self) -> Cost:
        """Return parameters, units and arithmetic, with the tokenizer's vocabulary."""
        return count(self.trial, self.prepared.vocab_size)

    def model(self) -> Network:
        """Return the untrained transformer."""
        return Transformer(self.trial, self.prepared.vocab_size)

    def calibration(self) -> Tensor:
        """Return ids [B, T] from the training split; they depend on init_seed only."""
        time, wanted = self.trial.model.context, max(4096, 64 * self.trial.tree.leaves)
        stream = self.prepared.train
        generator = np.random.default_rng(self.trial.init_seed)
        starts = generator.integers(0, max(1, len(stream) - time), size=-(-wanted // time))
        return torch.from_numpy(np.stack([stream[s : s + time] for s in starts]).astype(np.int64))

    def data(self, start_step: int) -> LightningDataModule:
        """Return windows of the training split, and the fixed held-out slice."""
        trial = self.trial
        train, context = trial.train, trial.model.context
        batches: dict[str, Any] = {
            "context": context,
            "batch_size": train.batch_size // train.accumulate // train.devices,
            "data_seed": trial.data_seed,
            "steps": train.steps * train.accumulate,
            "start_step": start_step * train.accumulate,
            "eval_tokens": train.eval_tokens,
            "eval_batch_size": max(1, EVAL_BATCH_TOKENS // context),
        }
        if trial.corpus.stream:
            return StreamData(self.prepared, trial.corpus, self._data_root / ".cache", **batches)
        return TokenData(self.prepared, **batches)

    def loss(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the mean next-token loss (nats) of ids [B, T + 1]."""
        return next_token_loss(model, inputs)

    def labels(self, inputs: Tensor) -> Tensor:
        """Return the ids that were read."""
        return previous_tokens(inputs)

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], watch: Watch, windows: Windows | None = None
    ) -> dict[str, float]:
        """Return bits per byte."""
        return {BPB.name: bits_per_byte(model, batches, self._token_bytes, watch, windows)}

    def ask(self, model: nn.Module, folder: Path) -> list[Score]:
        """Return the scores of the trial's questions."""
        if not self.trial.questions.tasks:
            return []
        assert isinstance(model, Transformer)
        tasks_folder = self._data_root / QUESTIONS
        return evaluate.ask(model, self.prepared, self.trial.questions, folder=folder, tasks_folder=tasks_folder)
