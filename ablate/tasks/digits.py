"""Another modality: handwritten digits (scikit-learn's, 8 x 8 pixels) as sequences of patches, to their class.

The images ship with scikit-learn, so nothing is fetched. A third of them is held out, the same third in every trial.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor, nn

from ablate.config import Trial, digest
from ablate.config.endpoints import ACCURACY, NATS
from ablate.config.task import DIGIT_PATCHES
from ablate.evaluation.scores import Score
from ablate.model.counts import Cost, cost_of, count_layer
from ablate.model.network import Network, child
from ablate.model.transformer import Block
from ablate.tasks.task import Batch, DrawnData, Watch, Windows, classify

SIDE, PATCH, CLASSES = 8, 2, 10
PIXELS = PATCH * PATCH
SPLIT_SEED = 20_260
"""Decides which third of the images is held out."""
BATCHES = 1  # random stream of a data_seed
EVALUATED = 512
"""Images run at a time."""


@cache
def images() -> tuple[Tensor, Tensor]:
    """Return patches float32 [1797, 16, 4], from -1 to 1, left to right and top to bottom, and classes int64 [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grid = torch.from_numpy(np.asarray(data.images, dtype=np.float32)) / 8 - 1
    rows = grid.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return rows.reshape(len(grid), DIGIT_PATCHES, PIXELS), torch.from_numpy(np.asarray(data.target, dtype=np.int64))


@cache
def split() -> tuple[Tensor, Tensor]:
    """Return the numbers of the images to train on and of those held out."""
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(images()[1])))
    held_out = len(order) // 3
    return order[held_out:], order[:held_out]


class DigitsModel(Network):
    """Logits [B, 10] of image numbers [B]: patches, transformer blocks, the mean over positions, a readout."""

    patches: Tensor
    classes: Tensor

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        model, d = trial.model, trial.model.d_model
        patches, classes = images()
        self.register_buffer("patches", patches, persistent=False)
        self.register_buffer("classes", classes, persistent=False)
        generator = torch.Generator().manual_seed(trial.init_seed)
        self.embedding = nn.Parameter(torch.empty(d, PIXELS).normal_(0, PIXELS**-0.5, generator=generator))
        self.readout = nn.Parameter(torch.empty(CLASSES, d).normal_(0, d**-0.5, generator=generator))
        backend: str = trial.train.backend
        self.blocks = nn.ModuleList(Block(trial, child(generator), backend) for _ in range(model.blocks))
        self.norm = nn.RMSNorm(d)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B, 10] of image numbers [B]."""
        x = F.linear(self.patches[ids], self.embedding)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x).mean(1), self.readout)


class Digits:
    """Handwritten digits, judged in nats and accuracy on images that training never sees."""

    def __init__(self, trial: Trial, data_root: Path) -> None:
        self.trial = trial

    @property
    def card(self) -> dict[str, Any]:
        """Return the data card; the hash names the images and how they are cut and split."""
        source = {"source": "scikit-learn", "name": "digits"}
        return {"source": source, "data_hash": digest(["digits", SPLIT_SEED, 1]), "tokenizer_hash": ""}

    def cost(self) -> Cost:
        """Return parameters and arithmetic; a token is a patch."""
        model, layer = self.trial.model, count_layer(self.trial)
        d, blocks = model.d_model, model.blocks
        attention, norms = 4 * d * d, d * (2 if model.feedforward != "none" else 1)
        shared = d * (PIXELS + CLASSES + 1) + blocks * (attention + norms)
        weights = blocks * (attention + layer.active_weights) + d * PIXELS
        # q·k and the weighted sum of v, over half of the patches on average; the readout once for all patches
        more = blocks * 2 * d * (DIGIT_PATCHES + 1) // 2 + d * CLASSES // DIGIT_PATCHES
        return cost_of(layer, layers=blocks, shared_params=shared, flops_per_token=2 * (weights + more))

    def model(self) -> Network:
        """Return the untrained model."""
        return DigitsModel(self.trial)

    def calibration(self) -> Tensor:
        """Return the images to train on."""
        return split()[0]

    def data(self, start_step: int) -> LightningDataModule:
        """Return batches of images drawn with replacement, and those held out."""
        known, held_out = split()

        def draw(step: int, size: int) -> Tensor:
            rng = np.random.default_rng([self.trial.data_seed, BATCHES, step])
            return known[torch.from_numpy(rng.integers(0, len(known), size))]

        return DrawnData(self.trial, start_step, draw, held_out, EVALUATED)

    def loss(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the mean cross-entropy (nats) of the classes of images [B]."""
        return F.cross_entropy(model(inputs).float(), _classes(model)[inputs])

    def labels(self, inputs: Tensor) -> Tensor:
        """Return the class of each patch's image."""
        return images()[1][inputs.cpu()].repeat_interleave(DIGIT_PATCHES)

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], watch: Watch, windows: Windows | None = None
    ) -> dict[str, float]:
        """Return the mean cross-entropy in nats and the share of images whose class is the likeliest."""
        nats, known, count = classify(model, _classes(model), batches, watch)
        return {NATS.name: nats / count, ACCURACY.name: known / count}

    def ask(self, model: nn.Module, folder: Path) -> list[Score]:
        """Return no score: there are no questions."""
        return []


def _classes(model: nn.Module) -> Tensor:
    assert isinstance(model, DigitsModel)
    return model.classes
