"""The seam between a trial and what it learns: all that training, evaluation, probes and studies ask of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ablate.config import Trial
from ablate.evaluation.scores import Score
from ablate.model.counts import Cost
from ablate.model.network import Network, evaluating

Batch = dict[str, Tensor]
"""One entry: the inputs."""
Watch = Callable[[Tensor], None]
Windows = Callable[[Tensor, Tensor], None]


class TrialTask(Protocol):
    """A trial's task with its data. To add one: a class like this, its entry in `registry.tasks`, and what docs/tasks.md says."""

    @property
    def card(self) -> dict[str, Any]:
        """Return what is known of the data: `source`, `data_hash`, `tokenizer_hash` and more."""
        ...

    def cost(self) -> Cost:
        """Return parameters, units and arithmetic."""
        ...

    def model(self) -> Network:
        """Return the untrained model, the same for the same init_seed."""
        ...

    def calibration(self) -> Tensor:
        """Return inputs for initialisations that look at data; they depend on seeds only."""
        ...

    def data(self, start_step: int) -> LightningDataModule:
        """Return the training batches after so many optimizer steps, and the fixed batches of every evaluation."""
        ...

    def loss(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the mean loss on a batch of inputs."""
        ...

    def labels(self, inputs: Tensor) -> Tensor | None:
        """Return a name for each token that inputs give to a layer; None where they have none."""
        ...

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], watch: Watch, windows: Windows | None = None
    ) -> dict[str, float]:
        """Return the task's endpoints; `watch` gets the inputs of each batch right after its forward pass.

        `windows` gets bits and bytes of each window [B] of text; other tasks have none.
        """
        ...

    def ask(self, model: nn.Module, folder: Path) -> list[Score]:
        """Return scores of questions at the end of a finished run; what each gave goes to a table in `folder`."""
        ...


class DrawnData(LightningDataModule):
    """Batches that are drawn when they are needed, each a function of its micro-step, and the fixed held-out inputs.

    Args:
        trial: says how long and in what parts it trains.
        start_step: optimizer steps that have been taken.
        draw: returns the inputs of a micro-step, as many as asked for.
        held_out: what every evaluation looks at, `at_a_time` of it in a batch.
    """

    def __init__(
        self, trial: Trial, start_step: int, draw: Callable[[int, int], Tensor], held_out: Tensor, at_a_time: int
    ) -> None:
        super().__init__()
        parts = trial.train.accumulate
        self._size, self._steps = trial.train.batch_size // parts, range(start_step * parts, trial.train.steps * parts)
        self._draw, self._evaluation = draw, torch.split(held_out, at_a_time)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the batches of the micro-steps."""
        return _loader({"inputs": self._draw(step, self._size)} for step in self._steps)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the batches of an evaluation."""
        return _loader({"inputs": inputs} for inputs in self._evaluation)


class _Batches(IterableDataset[Batch]):
    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _loader(batches: Iterable[Batch]) -> DataLoader[Batch]:
    # A generator of its own: a loader draws a seed when iterated, and must not advance the run's random state.
    return DataLoader(_Batches(batches), batch_size=None, generator=torch.Generator())


@torch.no_grad()
def classify(model: nn.Module, classes: Tensor, batches: Iterable[Batch], watch: Watch) -> tuple[float, float, float]:
    """Return summed cross-entropy in nats, how many classes [inputs] were the likeliest, and how many were asked for."""
    sums = torch.zeros(3, dtype=torch.float64, device=classes.device)
    with evaluating(model):
        for batch in batches:
            ids = batch["inputs"].to(classes.device)
            logits, wanted = model(ids).float(), classes[ids]
            sums[0] += F.cross_entropy(logits, wanted, reduction="sum").double()
            sums[1] += (logits.argmax(1) == wanted).sum()
            sums[2] += len(ids)
            watch(ids)
    nats, known, count = sums.tolist()
    return nats, known, count


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Draw standard normal numbers."""
    return rng.standard_normal(shape, dtype=np.float32)
