"""Quality on a fixed held-out slice: bits per byte, whatever the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.distributed import sum_over_ranks
from ablate.model.network import evaluating

WINDOWS_SCHEMA: dict[str, pl.DataType] = {"window": pl.Int32(), "bytes": pl.Int32(), "bits": pl.Float32()}
"""One row a window of the held-out slice: its place in the text, and the bytes and bits of its targets."""


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of ids [B, T], from our models and from Hugging Face's."""
    out = model(tokens)
    logits = out if isinstance(out, Tensor) else out.logits
    assert isinstance(logits, Tensor)
    return logits


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    token_bytes: Tensor,
    watch: Callable[[Tensor], None] | None = None,
    windows: Callable[[Tensor, Tensor], None] | None = None,
) -> float:
    """Sum of -log2 p over the targets, divided by the bytes behind them (`token_bytes` int64 [V]).

    Batches hold `tokens` int64 [B, T + 1]; position t predicts t + 1. `watch` is called with the input ids [B, T] after
    each forward, while the tree layers still hold the leaves of that batch; `windows` with bits and bytes of each window,
    both [B]. Ranks of a distributed run share the batches and add up their sums. Raises ValueError when the slice holds no byte.
    """
    device = next(model.parameters()).device
    token_bytes = token_bytes.to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(model):
        for batch in batches:
            tokens = batch["tokens"].to(device)
            targets = tokens[:, 1:].reshape(-1)
            logits = logits_of(model, tokens[:, :-1]).reshape(targets.numel(), -1)
            likely = F.log_softmax(logits.float(), dim=-1)
            sums[0] += F.nll_loss(likely, targets, reduction="sum").double()
            sums[1] += token_bytes[targets].sum()
            if watch is not None:
                watch(tokens[:, :-1])
            if windows is not None:
                each = F.nll_loss(likely, targets, reduction="none").double()
                lengths = token_bytes[targets].reshape(len(tokens), -1).sum(1)
                windows(each.reshape(len(tokens), -1).sum(1) / math.log(2), lengths)
    sum_over_ranks(sums)
    nats, count = sums.tolist()
    if count == 0:
        raise ValueError("the held-out slice holds no byte of text")
    return float(nats / math.log(2) / count)
