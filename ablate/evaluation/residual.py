"""The inputs of a trained model's feed-forward layers, as keys of the facts task."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ablate.config import ConfigError
from ablate.model.network import evaluating
from ablate.model.transformer import Transformer


@torch.no_grad()
def residual_keys(model: Transformer, windows: Tensor, block: int, count: int, seed: int = 0) -> NDArray[np.float16]:
    """Return `count` different inputs [count, d] of a block's feed-forward layer, float16, drawn from all positions.

    Args:
        model: a trained model.
        windows: token ids [B, T] of held-out text.
        block: which block's layer; 0 is the first.
        count: vectors wanted. One that repeats another is left out: the first token of a window gives few of them.
        seed: of the draw.

    Raises:
        ConfigError: the model has no such block, no feed-forward layer, or the text gives too few vectors.
    """
    if not 0 <= block < len(model.blocks):
        raise ConfigError(f"block is {block}: the model has blocks 0 to {len(model.blocks) - 1}")
    layer = getattr(model.blocks[block], "feedforward", None)
    if not isinstance(layer, nn.Module):
        raise ConfigError("the model has no feed-forward layers, so they have no inputs")
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2).half()))
    try:
        with evaluating(model):
            for part in torch.split(windows, 64):
                model.features(part)
    finally:
        hook.remove()
    vectors = np.unique(torch.cat(seen).numpy(), axis=0)
    if len(vectors) < count:
        raise ConfigError(
            f"count is {count}: the text gives {len(vectors)} different vectors; ask for fewer, or give more tokens"
        )
    chosen: NDArray[np.float16] = vectors[np.random.default_rng(seed).permutation(len(vectors))[:count]]
    return chosen
