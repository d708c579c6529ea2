"""Log-likelihoods of continuations, in batches, with shared prefixes computed once.

The rules are those of EleutherAI's harness for Hugging Face models (lm_eval 0.4.13, models/huggingface.py): the context
is cut from the left so that all but the last token fit the model, and only the continuation is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.model.transformer import Transformer

BATCH_TOKENS = 16384
"""Tokens of a batch, padding included; a shared prefix counts for every row that shares it."""
LOGIT_ROWS = 2048
"""Positions whose logits over the vocabulary are in memory at once."""

Logits = Callable[[Tensor], Tensor]
"""Any causal model: ids int64 [B, T] to logits [B, T, V]."""
Ids = tuple[int, ...]
Request = tuple[Ids, Ids]
"""Context and continuation, cut to the model's context."""

R = TypeVar("R")


class Scored(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have written it."""

    total: float
    greedy: bool


class Scorer:
    """Scores continuations with `model`, whose input is at most `context` tokens.

    A `Transformer` runs with a key-value cache: a context that several requests share is computed once. Any other
    callable gets whole sequences, each different one once. Counts `requests` and how many of them were `truncated`.
    """

    def __init__(self, model: Transformer | Logits, context: int, *, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model, self.context, self.batch_tokens = model, context, batch_tokens
        self.device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
        self.requests = self.truncated = 0

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """Of each (context, continuation) of ids. Raises ValueError where one is empty, and where a continuation is
        longer than the model's context.
        """
        requests = [self._fit(tuple(context), tuple(continuation)) for context, continuation in pairs]
        run = self._cached if isinstance(self.model, Transformer) else self._whole
        found = dict(run(list(dict.fromkeys(requests))))
        return [found[request] for request in requests]

    def _fit(self, context: Ids, continuation: Ids) -> Request:
        if not context or not continuation:
            raise ValueError("a context and a continuation of at least one token each are needed")
        if len(continuation) > self.context:
            raise ValueError(f"a continuation has {len(continuation)} tokens; the model's context is {self.context}")
        self.requests += 1
        over = len(context) + len(continuation) - (self.context + 1)
        self.truncated += over > 0
        return context[max(0, over) :], continuation

    def _cached(self, requests: list[Request]) -> Iterator[tuple[Request, Scored]]:
        """Contexts into a cache, each once; then of every request as many last tokens as the longest continuation."""
        model = self.model
        assert isinstance(model, Transformer)
        # Contexts of one length, and equal ones, come together.
        requests = sorted(requests, key=lambda r: (-len(r[0]), r))
        for batch in _batches(requests, lambda r: len(r[0]) + len(r[1]), self.batch_tokens):
            contexts = list(dict.fromkeys(context for context, _ in batch))
            cache = model.cache(len(contexts), max(map(len, contexts)))
            model.features(pad(contexts, self.device), cache)
            # Every row ends with its own last token, so no padding follows the last position.
            width = max(len(continuation) for _, continuation in batch)
            inputs = [context + continuation[:-1] for context, continuation in batch]
            starts = [max(0, len(ids) - width) for ids in inputs]
            places = {context: row for row, context in enumerate(contexts)}
            wide = cache.select([places[context] for context, _ in batch], max(map(len, inputs)))
            wide.rewind(starts)
            features = model.features(pad([ids[s:] for ids, s in zip(inputs, starts, strict=True)], self.device), wide)
            ends = [len(ids) - s for ids, s in zip(inputs, starts, strict=True)]
            yield from _read(batch, features, range(len(batch)), ends, model.logits)

    def _whole(self, requests: list[Request]) -> Iterator[tuple[Request, Scored]]:
        """Whole inputs; requests that differ in their last token only share one."""
        sharing: dict[Ids, list[Request]] = {}
        for context, continuation in requests:
            sharing.setdefault(context + continuation[:-1], []).append((context, continuation))
        for inputs in _batches(sorted(sharing, key=lambda ids: (-len(ids), ids)), len, self.batch_tokens):
            logits = self.model(pad(inputs, self.device))
            batch = [(request, row) for row, ids in enumerate(inputs) for request in sharing[ids]]
            rows = [row for _, row in batch]
            yield from _read([r for r, _ in batch], logits, rows, [len(inputs[row]) for row in rows], lambda x: x)


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Ids int64 [B, T], padded on the right with 0: a causal model does not see what follows a position."""
    width = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences], dtype=torch.int64, device=device)


def _batches(items: Iterable[R], size: Callable[[R], int], tokens: int) -> Iterator[list[R]]:
    """Consecutive runs of items of at most `tokens` once padded to the largest; a single item may be more."""
    batch: list[R] = []
    largest = 0
    for item in items:
        if batch and max(largest, size(item)) * (len(batch) + 1) > tokens:
            yield batch
            batch, largest = [], 0
        batch.append(item)
        largest = max(largest, size(item))
    if batch:
        yield batch


def _read(
    batch: Sequence[Request],
    outputs: Tensor,
    rows: Iterable[int],
    ends: Sequence[int],
    project: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Request, Scored]]:
    """Scores from outputs [B, T, …]: of request i the positions that end before ends[i] in row rows[i]."""
    lengths = [len(continuation) for _, continuation in batch]
    picked = torch.cat([outputs[r, e - n : e] for r, e, n in zip(rows, ends, lengths, strict=True)])
    targets = torch.tensor([i for _, continuation in batch for i in continuation], device=outputs.device)
    totals, greedy = [], []
    for part, wanted in zip(torch.split(picked, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True):
        logits = project(part).float()
        totals.append(F.log_softmax(logits, dim=-1).gather(1, wanted[:, None])[:, 0].double())
        greedy.append(logits.argmax(-1) == wanted)
    parts = zip(torch.split(torch.cat(totals), lengths), torch.split(torch.cat(greedy), lengths), strict=True)
    for request, (nats, right) in zip(batch, parts, strict=True):
        yield request, Scored(float(nats.sum()), bool(right.all()))
