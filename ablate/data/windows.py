"""Windows of a packed stream: their places in the training order, and the fixed ones a model is evaluated on."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ablate.config import ConfigError
from ablate.data.tokens import Stream

EVAL_BATCH_TOKENS = 4096
"""Tokens of one evaluation batch, so that memory does not depend on the context."""

Batch = dict[str, Tensor]
"""{"tokens": int64 [B, T + 1]}: the first T columns are inputs, the last T their targets."""


class DataOrder:
    """Return which window of a stream is at which place of the training order; pure, and the same on every machine.

    The order goes through epochs. In each, the stream is cut on a grid of `context` tokens that starts at a random
    offset (so that windows differ between epochs), and the windows come in a random order. Places are counted over the
    whole run and all processes: a batch is a run of places, so however it is split, it holds the same windows.
    Raises ConfigError if the stream is shorter than one window.
    """

    def __init__(self, length: int, context: int, seed: int) -> None:
        if length < context + 1:
            raise ConfigError(
                f"model.context is {context}: the training split has {length} tokens, fewer than one window "
                f"of {context + 1}; use a shorter context or a larger corpus"
            )
        self.context, self.seed = context, seed
        # As many windows as fit at every offset, so that all epochs have the same number of places.
        self.windows = max(1, (length - context) // context)
        self.offsets = min(context, length - self.windows * context)

    def starts(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Start of the windows at places first … first + count - 1: int64 [count]."""
        epochs, places = np.divmod(np.arange(first, first + count), self.windows)
        starts = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            offset, order = _epoch(self.seed, int(epoch), self.windows, self.offsets)
            of_epoch = epochs == epoch
            starts[of_epoch] = offset + self.context * order[places[of_epoch]]
        return starts


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, offsets: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Offset and order of an epoch. Raw bits of a bit generator are fixed by NumPy's policy; `permutation` is not."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch)))
    offset = int(bits.random_raw()) % offsets
    return offset, np.argsort(bits.random_raw(windows), kind="stable")


def read(stream: Stream, starts: npt.NDArray[np.int64], context: int) -> Tensor:
    """Windows of context + 1 tokens: int64 [len(starts), context + 1]."""
    return torch.from_numpy(np.stack([stream[s : s + context + 1] for s in starts]).astype(np.int64))


def evaluation_batches(stream: Stream, context: int, wanted: int) -> list[Batch]:
    """The evaluation slice of a held-out stream, at least `wanted` tokens where it has them, in its order.

    A batch has at most EVAL_BATCH_TOKENS tokens, or one window. Raises ConfigError if the stream is shorter than a window.
    """
    windows = read(stream, evaluation_starts(len(stream), context, wanted), context)
    return [{"tokens": part} for part in torch.split(windows, max(1, EVAL_BATCH_TOKENS // context))]


def evaluation_starts(length: int, context: int, wanted: int) -> npt.NDArray[np.int64]:
    """Starts of the fewest whole windows that hold the wanted tokens, evenly over a stream, without overlap."""
    whole = (length - 1) // context
    if whole < 1:
        raise ConfigError(
            f"model.context is {context}: the validation split has {length} tokens, fewer than one window "
            f"of {context + 1}; use a shorter context, a larger corpus or a larger corpus.validation_share"
        )
    count = min(whole, -(-wanted // context))
    return np.arange(count) * whole // count * context
