"""Facts whose keys are what a trained model's feed-forward layer reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ablate.config import ConfigError, Trial
from ablate.evaluation.residual import residual_keys
from ablate.model.network import evaluating
from ablate.model.transformer import Block, Transformer
from ablate.tasks.facts import Facts, FactsModel, read_keys
from ablate.training.trial import run_trial

MODEL = {"d_model": 16, "heads": 2, "blocks": 2, "context": 32}


def facts(path: Path | None, count: int = 100) -> Trial:
    task = {
        "kind": "facts",
        "facts": count,
        "classes": 8,
        "keys": "residual",
        "keys_file": None if path is None else str(path),
    }
    sections = {"task": task, "model": {"d_model": 16, "heads": 1}, "tree": {"trees": 2, "depth": 2, "leaf_width": 1}}
    return Trial.model_validate({**sections, "train": {"steps": 60, "batch_size": 64, "eval_every": 30, "lr": 0.02}})


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Transformer(Trial.model_validate({"model": MODEL, "tree": {"trees": 1, "depth": 2}}), 50)
    tokens = torch.randint(50, (40, 32), generator=torch.Generator().manual_seed(0))
    tokens[1] = tokens[0]  # a window that repeats gives nothing new
    found = residual_keys(model, tokens, 1, 600)
    with evaluating(model):
        first, block = model.blocks
        assert isinstance(block, Block)
        assert block.norm is not None
        x = first(torch.nn.functional.embedding(tokens, model.embedding))
        read = block.norm(x + block.attention(block.attention_norm(x))).flatten(0, 1).half().detach().numpy()
    rows = {row.tobytes() for row in read}
    assert len(rows) <= 39 * 32
    assert len({row.tobytes() for row in found} & rows) == 600, "600 different inputs of the layer"
    with pytest.raises(ConfigError, match=r"count is 5000: the text gives \d+ different vectors"):
        residual_keys(model, tokens, 1, 5000)
    with pytest.raises(ConfigError, match="block is 2: the model has blocks 0 to 1"):
        residual_keys(model, tokens, 2, 10)
    path = tmp_path_factory.mktemp("keys") / "keys.npy"
    np.save(path, found)
    return path


def test_keys_are_vectors_of_the_file_at_one_length_chosen_by_data_seed(vectors: Path, tmp_path: Path) -> None:
    config = facts(vectors)
    task = Facts(config, tmp_path)
    model = task.model()
    assert isinstance(model, FactsModel)
    assert model.keys.norm(dim=1).numpy() == pytest.approx(4.0, rel=1e-5)
    known = np.load(vectors).astype(np.float32)
    cosine = (model.keys.numpy() / 4) @ (known / np.linalg.norm(known, axis=1, keepdims=True)).T
    best = cosine.argmax(1)
    assert cosine.max(1) == pytest.approx(1, abs=1e-5)
    assert len(set(best)) == 100, "no vector twice"
    other = Facts(config.model_copy(update={"data_seed": 1}), tmp_path).model()
    assert not torch.equal(other.get_buffer("keys"), model.keys)
    result = run_trial(config, data_root=tmp_path, folder=tmp_path / "run", threads=1)
    assert result.status == "finished"
    assert result.final.task["kbit_stored"] > 0


def test_another_content_of_the_file_is_another_data_hash(vectors: Path, tmp_path: Path) -> None:
    copy = tmp_path / "keys.npy"
    np.save(copy, np.load(vectors))
    same = Facts(facts(copy), tmp_path).card["data_hash"]
    assert same == Facts(facts(vectors), tmp_path).card["data_hash"]
    np.save(copy, np.load(vectors)[::-1])
    assert Facts(facts(copy), tmp_path).card["data_hash"] != same


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            np.ones((200, 8), np.float16),
            r"holds float16 \[200, 8\]: vectors \[V, 16\] of floating-point numbers are expected",
        ),
        (np.ones((200, 16), np.int64), r"holds int64 \[200, 16\]"),
        (np.ones((50, 16), np.float16), r"task.facts is 100: task.keys_file .* has 50 vectors"),
        (np.zeros((200, 16), np.float32), "has a vector that is 0 or not finite"),
        (np.full((200, 16), np.nan, np.float32), "has a vector that is 0 or not finite"),
        (b"", "cannot be read"),
        (b"\x93NUMPY\x01", "cannot be read"),
        (np.array([{}], dtype=object), "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_files_that_hold_no_keys_are_refused_in_one_line(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message) as error:
        read_keys(facts(path))
    assert "\n" not in str(error.value)


def test_residual_keys_and_their_file_go_together() -> None:
    with pytest.raises(ValueError, match="keys_file is None: it is given with keys 'residual', and only then"):
        facts(None)
