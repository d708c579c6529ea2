"""Small corpora of real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ablate.config import Corpus

WORDS = ["the", "tree", "of", "a", "leaf", "and", "its", "root", "not", "even", "light", "falls", "→", "größer", "🌳"]


def text(seed: int, words: int = 60) -> str:
    """Distinct pseudo-prose."""
    rng = np.random.default_rng(seed)
    return f"{seed}: " + " ".join(rng.choice(WORDS, words)) + "\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Corpus]:
    """Write documents, one file each, and give the corpus of that folder."""

    def build(count: int = 120, **settings: object) -> Corpus:
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        for i in range(count):
            (folder / f"{i:04d}.txt").write_text(text(i), encoding="utf-8")
        fields = {"source": "files", "path": str(folder), "vocab_size": 300, "validation_share": 0.2, "test_share": 0.1}
        return Corpus.model_validate({**fields, **settings})

    return build
