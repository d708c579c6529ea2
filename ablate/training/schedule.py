"""The learning rate at every step of a run."""

from __future__ import annotations

import math

from ablate.config import Train


def learning_rate(train: Train, step: int) -> float:
    """The schedule at an optimizer step (0-based): linear warm-up, then cosine or a trapezoid's flat top and decay."""
    warm = max(1, round(train.warmup * train.steps))
    if step < warm:
        return train.lr * (step + 1) / warm
    left = (train.steps - step) / max(1, train.steps - warm)
    if train.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    else:
        share = min(1.0, (train.steps - step) / max(1.0, 0.2 * train.steps))
    return train.lr * (train.final_lr + (1 - train.final_lr) * share)
