"""Sizes a study starts from; its own base comes on top."""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["nano", "small", "gpt2-small", "opt-1.3b", "gpt-1.3b", "facts", "teacher", "digits"]

_BILLION = {
    "batch_size": 512,
    "accumulate": 64,
    "lr": 2e-4,
    "steps": 25000,
    "eval_every": 1000,
    "eval_tokens": 262144,
    "activation_checkpointing": True,
}

_SMALL_TREE = {"trees": 4, "depth": 5, "leaf_width": 1}
_SMALL = {
    "batch_size": 1024,
    "steps": 2000,
    "warmup": 0.0,
    "final_lr": 0.0,
    "betas": (0.9, 0.98),
    "weight_decay": 0.0,
    "eval_every": 500,
    "eval_tokens": 8192,
    "checkpoint_every": 500,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "nano": {
        "model": {"d_model": 128, "blocks": 4, "heads": 4, "context": 256},
        "tree": {"trees": 4, "depth": 6, "leaf_width": 4},
    },
    "small": {
        "model": {"d_model": 384, "blocks": 6, "heads": 6, "context": 512},
        "tree": {"trees": 4, "depth": 7, "leaf_width": 2},
        "train": {"batch_size": 32, "lr": 1e-3, "steps": 5000, "eval_every": 500, "eval_tokens": 131072},
    },
    "gpt2-small": {
        "model": {"d_model": 768, "blocks": 12, "heads": 12, "context": 1024},
        "tree": {"trees": 4, "depth": 8, "leaf_width": 2},
        "train": {
            "batch_size": 512,
            "accumulate": 16,
            "lr": 6e-4,
            "steps": 19000,
            "eval_every": 1000,
            "eval_tokens": 262144,
        },
        "corpus": {"vocab_size": 50257},
    },
    # Blocks, width, heads, context and vocabulary of OPT-1.3B and of GPT-3 XL; in a micro-batch of 8, a million tokens a step.
    "opt-1.3b": {
        "model": {"d_model": 2048, "blocks": 24, "heads": 32, "context": 2048},
        "tree": {"trees": 8, "depth": 8, "leaf_width": 3, "activation": "relu"},
        "dense": {"activation": "relu"},
        "train": _BILLION,
        "corpus": {"vocab_size": 50272},
    },
    "gpt-1.3b": {
        "model": {"d_model": 2048, "blocks": 24, "heads": 16, "context": 2048},
        "tree": {"trees": 8, "depth": 8, "leaf_width": 3},
        "train": _BILLION,
        "corpus": {"vocab_size": 50257},
    },
    # One layer of 252 units of which a token activates 24; some seconds a trial on one core.
    "facts": {
        "task": {"kind": "facts"},
        "model": {"d_model": 64, "blocks": 1, "heads": 1},
        "tree": _SMALL_TREE,
        "train": _SMALL | {"lr": 5e-3},
    },
    "teacher": {
        "task": {"kind": "teacher"},
        "model": {"d_model": 64, "blocks": 1, "heads": 1},
        "tree": _SMALL_TREE,
        "train": _SMALL | {"lr": 5e-3},
    },
    "digits": {
        "task": {"kind": "digits"},
        "model": {"d_model": 64, "blocks": 2, "heads": 4, "context": 16},
        "tree": _SMALL_TREE,
        "train": {"batch_size": 64, "steps": 600, "eval_every": 150, "checkpoint_every": 300},
    },
}
