"""Files of weights that are damaged, of another version, or another tool's: one line, and never a model."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ablate.config import ConfigError, Trial
from ablate.model.transformer import Transformer
from ablate.training.checkpoint import load_model, save_model

TRIAL = Trial.model_validate(
    {
        "model": {"d_model": 16, "blocks": 1, "heads": 2, "context": 16},
        "tree": {"trees": 2, "depth": 2, "leaf_width": 2},
        "train": {"eval_tokens": 1024},
    }
)
VOCABULARY = 300


def weights(path: Path) -> Path:
    save_model(path, Transformer(TRIAL, VOCABULARY), TRIAL, "abc")
    return path


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(path)
    told = str(error.value)
    assert told.isprintable()
    assert len(told) < 600
    assert str(path) in told
    assert "weights_only" not in told
    return told


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    model, trial, tokenizer = load_model(weights(tmp_path / "w.pt"))
    assert (trial, tokenizer) == (TRIAL, "abc")
    again = load_model(weights(tmp_path / "w.pt"))[0]
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "`git lfs pull` fetches the weights"),
        (b"hello, no weights", "another tool's"),
        (b"e", "another tool's"),
        (bytes(1000), "another tool's"),
        (b"PK\x03\x04" + bytes(100), "another tool's"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "another tool's"),
        (b"<!DOCTYPE html><html>404</html>", "another tool's"),
        (pickle.dumps({"format": 1}), "another tool's"),
        (pickle.dumps(Path("x")), "another tool's"),
    ],
    ids=lambda c: ascii(c[:8]),
)
def test_bytes_that_are_no_weights_say_what_is_expected(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    assert message in refused(tmp_path / "w.pt")


def test_a_zip_of_something_else_and_a_folder_are_no_weights(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("readme", "text")
    assert "another tool's" in refused(tmp_path / "w.pt")
    (tmp_path / "d").mkdir()
    assert "Is a directory" in refused(tmp_path / "d")
    assert "does not exist" in refused(tmp_path / "nowhere")


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(name)


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda content: change(content["state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "has format 2; this version reads 1"),
        (lambda c: c.update(format=torch.zeros(3)), "has format"),
        (without("format"), "has format None"),
        (without("trial"), "has no trial"),
        (without("state"), "has no state"),
        (without("tokenizer_hash"), "has no tokenizer_hash"),
        (lambda c: c.update(vocab_size="9"), "has no vocab_size"),
        (lambda c: c.update(vocab_size=10**12), "its embedding does not fit its settings"),
        (lambda c: c.update(trial='{"later": 1}'), "is of another version of ablate: trial.later: unknown setting"),
        (
            lambda c: c.update(trial='{"tree": {"depth": 99}}'),
            "is of another version of ablate: trial.tree.depth is 99",
        ),
        (lambda c: c.update(trial="{"), "is of another version of ablate: its trial is not JSON"),
        (lambda c: c.update(trial="[" * 100_000), "its trial is not JSON: it is nested too deep"),
        (lambda c: c.update(trial=Trial().model_dump_json()), "its embedding does not fit its settings"),
        (state(lambda s: s.clear()), "its embedding does not fit its settings"),
        (state(lambda s: s.update(embedding=3)), "its embedding does not fit its settings"),
        (state(lambda s: s.pop(next(k for k in s if "w_in" in k))), "is missing"),
        (state(lambda s: s.update(x=torch.zeros(1))), "tensor 'x' is unknown"),
        (state(lambda s: s.update({next(k for k in s if "w_in" in k): torch.zeros(1)})), "is (1,), (2, 11, 16) is"),
        (state(lambda s: s.update({f"{next(k for k in s if 'w_in' in k)[:-5]}.branches": 3})), "does not fit"),
    ],
)
def test_content_of_another_version_or_shape_is_named(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    path = weights(tmp_path / "w.pt")
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    assert message in refused(path)


@pytest.mark.parametrize(
    "content", [{"model.weight": torch.zeros(2)}, [1, 2], torch.zeros(3), {}, {1: 2}, None], ids=lambda c: str(c)[:9]
)
def test_another_tools_weights_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    refused(tmp_path / "w.pt")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_gives_a_model_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(weights(tmp_path / "w.pt").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / "d.pt").write_bytes(content[:place] if data.draw(st.booleans()) else content)
    try:
        load_model(tmp_path / "d.pt")
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017
