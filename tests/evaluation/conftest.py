"""A corpus that a small model learns in seconds, and that model, trained and untrained."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

# Read when `datasets` and `huggingface_hub` are imported: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest

from ablate.config import Trial
from ablate.data.tokens import Prepared
from ablate.evaluation.evaluate import corpus_of
from ablate.model.transformer import Transformer
from ablate.training.checkpoint import load_model
from ablate.training.result import TrialResult
from ablate.training.trial import run_trial

THEMES, WORDS, DOCUMENTS = 12, 18, 150


def write_documents(folder: Path) -> None:
    """Each document keeps to one theme's words: which passage goes on is known from a few of them."""
    draw = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    themes = [["".join(draw.choices(letters, k=draw.randint(4, 7))) for _ in range(WORDS)] for _ in range(THEMES)]
    folder.mkdir(parents=True)
    for number in range(DOCUMENTS):
        words = draw.choices(themes[number % THEMES], k=draw.randint(150, 400))
        lines = [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]
        (folder / f"{number:03d}.txt").write_text(".\n".join(lines) + ".\n", encoding="utf-8")


@dataclass(frozen=True)
class Trained:
    """A finished trial, its model and its corpus."""

    trial: Trial
    result: TrialResult
    model: Transformer
    own: Prepared
    data_root: Path
    weights: Path

    def untrained(self) -> Transformer:
        return Transformer(self.trial, self.own.vocab_size).eval()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("evaluation")
    write_documents(root / "text")
    trial = Trial.model_validate(
        {
            "corpus": {"source": "files", "path": str(root / "text"), "vocab_size": 480, "validation_share": 0.3},
            "model": {"d_model": 32, "blocks": 2, "heads": 2, "context": 96},
            "tree": {"trees": 2, "depth": 4, "leaf_width": 4},
            "train": {"steps": 120, "batch_size": 8, "lr": 1e-2, "eval_every": 120, "eval_tokens": 2048}
            | {"keep_checkpoint": True},
        }
    )
    result = run_trial(trial, data_root=root / "data", folder=root / "run", threads=1)
    model, loaded, tokenizer_hash = load_model(root / "run" / "model.pt")
    own = corpus_of(loaded, tokenizer_hash, root / "data")
    return Trained(loaded, result, model, own, root / "data", root / "run" / "model.pt")
