"""Trained weights on disk: one file with the trial's settings beside the tensors, loaded with weights_only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ablate.config import ConfigError, Trial
from ablate.files import replacing
from ablate.model.ragged import shape_like
from ablate.model.transformer import Transformer

FORMAT = 1


def save_model(path: Path, model: Transformer, trial: Trial, tokenizer_hash: str) -> None:
    """Write weights and settings atomically."""
    content = {
        "format": FORMAT,
        "trial": trial.model_dump_json(),
        "vocab_size": model.embedding.shape[0],
        "tokenizer_hash": tokenizer_hash,
        "state": model.state_dict(),
    }
    save_atomically(path, content)


def load_model(path: Path) -> tuple[Transformer, Trial, str]:
    """Model (eval mode, CPU), its trial and its tokenizer's hash; ConfigError for a file that is not such a checkpoint."""
    content = read_checkpoint(path)
    if content.get("format") != FORMAT:
        raise ConfigError(f"checkpoint {str(path)!r} has format {content.get('format')!r}; this version reads {FORMAT}")
    trial = Trial.model_validate_json(content["trial"])
    model = Transformer(trial, content["vocab_size"])
    shape_like(model, content["state"])  # layers that were pruned
    model.load_state_dict(content["state"])
    return model.eval(), trial, str(content["tokenizer_hash"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's plain content, tensors on the CPU; ConfigError when it is missing or damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"checkpoint {str(path)!r} does not exist") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"checkpoint {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"checkpoint {str(path)!r} holds a {type(content).__name__}; a checkpoint of ablate is expected"
        )
    return content


def save_atomically(path: Path, content: Any) -> None:
    """Write `content` with torch.save, replacing the file in one step."""
    with replacing(path) as partial:
        torch.save(content, partial)
