"""What every trained model here is: a module around feed-forward layers of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ablate.config import Trial
from ablate.model.dense import DenseFeedForward
from ablate.model.moe import MixtureFeedForward
from ablate.model.tree import TreeFeedForward


class Network(nn.Module):
    """A model around feed-forward layers of a trial; it maps one tensor of inputs to one of outputs."""

    def trees(self) -> list[TreeFeedForward]:
        """The tree layers, first block first."""
        return [m for m in self.modules() if isinstance(m, TreeFeedForward)]

    def mixtures(self) -> list[MixtureFeedForward]:
        """The mixtures of experts, first block first."""
        return [m for m in self.modules() if isinstance(m, MixtureFeedForward)]

    @torch.no_grad()
    def calibrate(self, inputs: Tensor) -> None:
        """Finish initialisations that look at data, layer by layer in one pass over a batch of inputs."""
        waiting = [tree for tree in self.trees() if tree.needs_calibration]
        if waiting:
            with _calibrating(waiting), evaluating(self):
                self(inputs)


def feedforward(trial: Trial, generator: torch.Generator, backend: str) -> nn.Module | None:
    """Return a trial's feed-forward layer, untrained; None where it has none."""
    d_model = trial.model.d_model
    match trial.model.feedforward:
        case "tree":
            return TreeFeedForward(d_model, trial.tree, backend=backend, generator=child(generator))
        case "dense":
            return DenseFeedForward(d_model, trial.dense, generator=child(generator))
        case "moe":
            return MixtureFeedForward(d_model, trial.moe, generator=child(generator))
        case "none":
            return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then back as it was."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


@contextmanager
def _calibrating(trees: list[TreeFeedForward]) -> Iterator[None]:
    for tree in trees:
        tree.calibrating = True
    try:
        yield
    finally:
        for tree in trees:
            tree.calibrating = False


def child(generator: torch.Generator) -> torch.Generator:
    """Return a generator of its own for one part, so that attention starts the same whatever the feed-forward draws."""
    seed = int(torch.randint(2**62, (1,), generator=generator, device="cpu"))
    return torch.Generator().manual_seed(seed)
