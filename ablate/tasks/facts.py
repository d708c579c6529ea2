"""How much a feed-forward layer can store: the class of each of N random keys, between a fixed input and a fixed readout.

Keys have norm sqrt(d). Keys, classes, readout and the order of the batches follow from data_seed, so that arms of one seed
store the same facts; only the layer is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor, nn

from ablate.config import ConfigError, Task, Trial, digest, reason
from ablate.config.endpoints import ACCURACY, KBIT_STORED
from ablate.data.local_files import expanded
from ablate.evaluation.scores import Score
from ablate.model.counts import Cost, cost_of, count_layer
from ablate.model.network import Network, feedforward
from ablate.tasks.task import Batch, DrawnData, Watch, Windows, classify, normal

READOUT = 4.0
"""Scale of the readout: its columns have this expected norm."""
EVALUATED = 8192
"""Keys run at a time."""
KEYS, BATCHES = 0, 1  # random streams of a data_seed


class FactsModel(Network):
    """Logits [B, C] of key numbers int64 [B]: key, one feed-forward layer, readout."""

    keys: Tensor
    classes: Tensor
    readout: Tensor

    def __init__(self, trial: Trial, vectors: NDArray[np.float32] | None = None) -> None:
        super().__init__()
        task, d = trial.task, trial.model.d_model
        rng = np.random.default_rng([trial.data_seed, KEYS])
        keys = draw_keys(task, d, rng) if vectors is None else choose_keys(task, vectors, rng)
        self.register_buffer("keys", torch.from_numpy(keys), persistent=False)
        classes = torch.from_numpy(rng.integers(0, task.classes, task.facts))
        self.register_buffer("classes", classes, persistent=False)
        readout = normal(rng, d, task.classes) * np.float32(READOUT / math.sqrt(d))
        self.register_buffer("readout", torch.from_numpy(readout), persistent=False)
        generator = torch.Generator().manual_seed(trial.init_seed)
        self.feedforward = feedforward(trial, generator, trial.train.backend)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B, C] of key numbers [B]."""
        x = self.keys[ids]
        y = torch.zeros_like(x) if self.feedforward is None else self.feedforward(x)
        logits: Tensor = y @ self.readout.to(y.dtype)
        return logits


class Facts:
    """N facts, judged in kbit stored."""

    def __init__(self, trial: Trial, data_root: Path) -> None:
        self.trial, self.task = trial, trial.task
        self.vectors = read_keys(trial) if trial.task.keys_file else None

    @property
    def card(self) -> dict[str, Any]:
        """Return the data card; the hash names the way keys are drawn, which seeds and settings then fix, and a file's content."""
        content = [] if self.vectors is None else [sha256(self.vectors.tobytes()).hexdigest()]
        return {"source": {"source": "facts"}, "data_hash": digest(["facts", 1, *content]), "tokenizer_hash": ""}

    def cost(self) -> Cost:
        """Return parameters of the layer, which alone is trained; arithmetic with the readout."""
        layer = count_layer(self.trial)
        flops = 2 * (layer.active_weights + self.trial.model.d_model * self.task.classes)
        return cost_of(layer, layers=1, shared_params=0, flops_per_token=flops)

    def model(self) -> Network:
        """Return the untrained model."""
        return FactsModel(self.trial, self.vectors)

    def calibration(self) -> Tensor:
        """Return all keys."""
        return torch.arange(self.task.facts)

    def data(self, start_step: int) -> LightningDataModule:
        """Return batches of keys drawn with replacement; every evaluation asks for all of them."""

        def draw(step: int, size: int) -> Tensor:
            rng = np.random.default_rng([self.trial.data_seed, BATCHES, step])
            return torch.from_numpy(rng.integers(0, self.task.facts, size))

        return DrawnData(self.trial, start_step, draw, torch.arange(self.task.facts), EVALUATED)

    def loss(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the mean cross-entropy (nats) of the classes of keys [B]."""
        return F.cross_entropy(model(inputs).float(), _classes(model)[inputs])

    def labels(self, inputs: Tensor) -> None:
        """Return nothing: a key's number is its own and no other's."""
        return

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], watch: Watch, windows: Windows | None = None
    ) -> dict[str, float]:
        """Return bits stored, in all and for each parameter of the layer, and the share of classes that are known."""
        nats, known, _ = classify(model, _classes(model), batches, watch)
        # Below 0 guessing would do better, so nothing is stored; a loss that is not finite stays visible.
        bits = self.task.facts * math.log2(self.task.classes) - nats / math.log(2)
        bits = max(0.0, bits) if math.isfinite(bits) else bits
        params = count_layer(self.trial).total_params
        return {
            KBIT_STORED.name: bits / 1000,
            "bits_per_param": bits / params if params else 0.0,
            ACCURACY.name: known / self.task.facts,
        }

    def ask(self, model: nn.Module, folder: Path) -> list[Score]:
        """Return no score: there are no questions."""
        return []


def draw_keys(task: Task, d: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw keys [N, d] of norm sqrt(d), whose variance is even or falls along random orthogonal directions."""
    keys = normal(rng, task.facts, d)
    if task.keys == "correlated":
        directions = np.linalg.qr(rng.standard_normal((d, d)))[0]
        sd = np.arange(1, d + 1) ** (-task.spectrum / 2)
        keys = (keys * sd @ directions.T).astype(np.float32)
    return _of_one_length(keys)


def choose_keys(task: Task, vectors: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Choose keys [N, d] of norm sqrt(d) among the vectors [V, d] of a file, without repeats."""
    return _of_one_length(vectors[rng.permutation(len(vectors))[: task.facts]])


def read_keys(trial: Trial) -> NDArray[np.float32]:
    """Return the vectors [V, d] of a trial's file of keys.

    Raises:
        ConfigError: it cannot be read, or its vectors are too few, not finite, 0, or not as wide as the layer.
    """
    path, d = expanded(trial.task.keys_file or ""), trial.model.d_model
    where = f"task.keys_file {str(path)!r}"
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{where} cannot be read: {reason(error)}; a file that `ablate keys` wrote is expected"
        ) from None
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or found.ndim != 2 or found.shape[1] != d:
        shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "several arrays"
        raise ConfigError(
            f"{where} holds {shape}: vectors [V, {d}] of floating-point numbers are expected (model.d_model)"
        )
    if len(found) < trial.task.facts:
        raise ConfigError(f"task.facts is {trial.task.facts}: {where} has {len(found)} vectors")
    vectors: NDArray[np.float32] = found.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ConfigError(f"{where} has a vector that is 0 or not finite: its keys have no direction")
    return vectors


def _of_one_length(keys: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = (
        keys * np.float32(math.sqrt(keys.shape[1])) / np.linalg.norm(keys, axis=1, keepdims=True)
    )
    return scaled


def _classes(model: nn.Module) -> Tensor:
    assert isinstance(model, FactsModel)
    return model.classes
