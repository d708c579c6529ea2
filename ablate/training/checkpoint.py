"""Trained weights on disk: one file with the trial's settings beside the tensors, loaded with weights_only."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from ablate.config import ConfigError, Trial, echo, parse, reason
from ablate.config.text import load_json
from ablate.files import replacing
from ablate.model.network import Network
from ablate.model.ragged import shape_like
from ablate.model.transformer import Transformer

FORMAT = 1
POINTER = b"version https://git-lfs"
"""The first bytes of the file that Git LFS leaves in place of one it did not fetch."""
EXPECTED = "a file of weights that ablate wrote is expected"


def save_model(path: Path, model: Network, trial: Trial, tokenizer_hash: str) -> None:
    """Write weights and settings atomically."""
    content = {
        "format": FORMAT,
        "trial": trial.model_dump_json(),
        "vocab_size": model.embedding.shape[0] if isinstance(model, Transformer) else None,
        "tokenizer_hash": tokenizer_hash,
        "state": model.state_dict(),
    }
    save_atomically(path, content)


def load_model(path: Path) -> tuple[Transformer, Trial, str]:
    """Return a model (eval mode, CPU), its trial and its tokenizer's hash.

    Raises:
        ConfigError: the file is missing, damaged, of another version, or no such checkpoint.
    """
    content, where = read_checkpoint(path), f"checkpoint {str(path)!r}"
    if not whole_zip(path):
        raise ConfigError(f"{where} is damaged: its checksums are not those that were written with it")
    if not isinstance(content.get("format"), int) or content["format"] != FORMAT:
        raise ConfigError(f"{where} has format {echo(content.get('format'))}; this version reads {FORMAT}")
    text = content.get("trial")
    if isinstance(text, str) and (kind := _trial(text, where).task.kind) != "language":
        raise ConfigError(f"{where} is of task {kind!r}: a language model is expected")
    kinds = {"trial": str, "vocab_size": int, "tokenizer_hash": str, "state": dict}
    for name, wanted in kinds.items():
        if not isinstance(content.get(name), wanted):
            raise ConfigError(f"{where} has no {name}: {EXPECTED}")
    trial, state = _trial(content["trial"], where), content["state"]
    # Looked at first: a model is built at the size that its settings say, whatever the tensors are.
    if getattr(state.get("embedding"), "shape", None) != (content["vocab_size"], trial.model.d_model):
        raise ConfigError(f"{where} is damaged: its embedding does not fit its settings")
    model = Transformer(trial, content["vocab_size"])
    try:
        shape_like(model, state)  # layers that were pruned
        _check_tensors(model.state_dict(), state)
        model.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} does not fit its settings: {reason(error)}") from None
    return model.eval(), trial, content["tokenizer_hash"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's plain content, tensors on the CPU; raises ConfigError when it is missing or damaged."""
    where = f"checkpoint {str(path)!r}"
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {reason(error)}") from None
    if not start:
        raise ConfigError(f"{where} cannot be read: it is empty; {EXPECTED}")
    if start == POINTER:
        raise ConfigError(f"{where} cannot be read: it is a pointer of Git LFS; `git lfs pull` fetches the weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickles that it refuses next
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises what the bytes lead it to
        raise ConfigError(f"{where} cannot be read: {_why(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds a {type(content).__name__}; {EXPECTED}")
    return content


def _why(error: Exception) -> str:
    """Return what is wrong with a file; the unpickler's own words advise to load it unsafely."""
    return reason(error) if isinstance(error, OSError) else f"it is damaged, or another tool's; {EXPECTED}"


def _trial(text: str, where: str) -> Trial:
    try:
        return parse(Trial, load_json(text, "its trial"), where="trial")
    except ConfigError as error:
        raise ConfigError(f"{where} is of another version of ablate: {error}") from None


def _check_tensors(own: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError with the first tensor that is missing, unknown or of another shape."""
    for name in own.keys() | given.keys():
        if name not in own or name not in given:
            raise ValueError(f"tensor {echo(name)} is {'missing' if name in own else 'unknown'}")
        if not isinstance(given[name], torch.Tensor) or given[name].shape != own[name].shape:
            has = tuple(given[name].shape) if isinstance(given[name], torch.Tensor) else type(given[name]).__name__
            raise ValueError(f"tensor {echo(name)} is {has}, {tuple(own[name].shape)} is expected")


def save_atomically(path: Path, content: Any) -> None:
    """Write `content` with torch.save, replacing the file in one step."""
    # An open file: torch would write a path's name, which has the process's number in it, into the archive.
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(content, file)


def whole_zip(path: Path) -> bool:
    """Whether a file is one of torch's archives in which every part has the checksum that was written with it.

    torch itself does not compare them: a bit that flipped on the disk would change the result without a word.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError):
        return False
