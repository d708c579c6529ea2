"""How much a feed-forward layer can compute: the output of a random network of width T on fresh Gaussian inputs.

The student has a linear map beside its layer, which starts as the best one there is. So the share of variance unexplained
is 1 for what a linear map knows, and any gain over it is the layer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor, nn

from ablate.config import Trial, digest
from ablate.config.endpoints import UNEXPLAINED
from ablate.evaluation.scores import Score
from ablate.model.counts import Cost, cost_of, count_layer
from ablate.model.network import Network, evaluating, feedforward
from ablate.tasks.task import Batch, DrawnData, Watch, Windows, normal

TEACHER, BATCHES, HELD_OUT, CALIBRATION = range(4)  # random streams of a seed
EVALUATED = 8192
"""Inputs run at a time."""


class TeacherModel(Network):
    """Outputs [B, d] of inputs [B, d]: a linear map plus one feed-forward layer; and the teacher that it learns from."""

    w_in: Tensor
    w_out: Tensor

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        width, d = trial.task.teacher_width, trial.model.d_model
        rng = np.random.default_rng([trial.data_seed, TEACHER])
        w_in = normal(rng, width, d)
        w_in /= np.linalg.norm(w_in, axis=1, keepdims=True)  # unit rows: every hidden unit sees N(0, 1)
        w_out = normal(rng, width, d) / np.float32(math.sqrt(width))
        self.register_buffer("w_in", torch.from_numpy(w_in), persistent=False)
        self.register_buffer("w_out", torch.from_numpy(w_out), persistent=False)
        # relu(u) = u/2 + |u|/2, and |u| is uncorrelated with every linear function of Gaussian inputs.
        self.linear = nn.Parameter(torch.from_numpy(w_out.T @ w_in / 2))
        generator = torch.Generator().manual_seed(trial.init_seed)
        self.feedforward = feedforward(trial, generator, trial.train.backend)

    def forward(self, x: Tensor) -> Tensor:
        """Return the student's outputs [B, d]."""
        y = F.linear(x, self.linear)
        return y if self.feedforward is None else y + self.feedforward(x)

    @torch.no_grad()
    def teach(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's outputs [B, d], of mean 0, and their part that no linear map explains."""
        u = F.linear(x, self.w_in)
        mean = 1 / math.sqrt(2 * math.pi)
        return (F.relu(u) - mean) @ self.w_out, (u.abs() / 2 - mean) @ self.w_out


class Teacher:
    """A random network to imitate, judged in the share of its variance that is left unexplained."""

    def __init__(self, trial: Trial, data_root: Path) -> None:
        self.trial = trial

    @property
    def card(self) -> dict[str, Any]:
        """Return the data card; the hash names the way inputs are drawn, which seeds and settings then fix."""
        return {"source": {"source": "teacher"}, "data_hash": digest(["teacher", 1]), "tokenizer_hash": ""}

    def cost(self) -> Cost:
        """Return parameters and arithmetic of the layer and the linear map."""
        layer, linear = count_layer(self.trial), self.trial.model.d_model**2
        flops = 2 * (layer.active_weights + linear)
        return cost_of(layer, layers=1, shared_params=linear, flops_per_token=flops)

    def model(self) -> Network:
        """Return the untrained student."""
        return TeacherModel(self.trial)

    def calibration(self) -> Tensor:
        """Return inputs that init_seed alone decides."""
        return self._inputs(max(4096, 64 * self.trial.tree.leaves), self.trial.init_seed, CALIBRATION)

    def data(self, start_step: int) -> LightningDataModule:
        """Return inputs that are seen once, and the fixed ones of every evaluation."""
        seed = self.trial.data_seed
        held_out = self._inputs(self.trial.train.eval_tokens, seed, HELD_OUT)

        def draw(step: int, size: int) -> Tensor:
            return self._inputs(size, seed, BATCHES, step)

        return DrawnData(self.trial, start_step, draw, held_out, EVALUATED)

    def loss(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the mean squared error on inputs [B, d]."""
        return F.mse_loss(model(inputs).float(), _student(model).teach(inputs)[0])

    def labels(self, inputs: Tensor) -> None:
        """Return nothing: inputs have no names."""
        return

    @torch.no_grad()
    def measure(
        self, model: nn.Module, batches: Iterable[Batch], watch: Watch, windows: Windows | None = None
    ) -> dict[str, float]:
        """Return the squared error as a share of what the best linear map leaves."""
        student = _student(model)
        sums = torch.zeros(2, dtype=torch.float64, device=student.w_in.device)
        with evaluating(model):
            for batch in batches:
                x = batch["inputs"].to(student.w_in.device)
                outputs, beyond = student.teach(x)
                sums[0] += (model(x).float() - outputs).square().sum().double()
                sums[1] += beyond.square().sum().double()
                watch(x)
        error, left = sums.tolist()
        return {UNEXPLAINED.name: error / left}

    def ask(self, model: nn.Module, folder: Path) -> list[Score]:
        """Return no score: there are no questions."""
        return []

    def _inputs(self, count: int, *stream: int) -> Tensor:
        return torch.from_numpy(normal(np.random.default_rng(stream), count, self.trial.model.d_model))


def _student(model: nn.Module) -> TeacherModel:
    assert isinstance(model, TeacherModel)
    return model
