"""Generation: one token a step behind a key-value cache, for one prompt or a batch of them.

A prompt and what was written may outgrow the model's context C. Then the model sees a window that starts at a multiple
of C/2 and holds more than C/2 tokens: it moves once every C/2 tokens, and only then the cache is filled again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ablate.config import ConfigError
from ablate.data.codec import Codec
from ablate.evaluation.likelihood import Logits, pad
from ablate.model.decode import Cache
from ablate.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy (the lowest id among equals). Raises ConfigError."""

    temperature: float = 0.0
    top_k: int | None = None
    """Only the k likeliest tokens (and those as likely as the last of them)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}: 0 (greedy) or a finite number above it is expected")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: at least 1 is expected")

    def sampler(self) -> Callable[[Tensor], list[int]]:
        """A function from logits [B, V] to an id for each row; its random numbers depend on the seed only."""
        generator = torch.Generator().manual_seed(self.seed)

        def choose(logits: Tensor) -> list[int]:
            if self.temperature == 0 or self.top_k == 1:
                chosen: list[int] = logits.argmax(-1).tolist()
                return chosen
            logits = logits.float().cpu()
            if self.top_k is not None and self.top_k < logits.shape[-1]:
                least = logits.topk(self.top_k, dim=-1).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            probabilities = torch.softmax(logits / self.temperature, dim=-1)
            drawn: list[int] = torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()
            return drawn

        return choose


class Writer:
    """Rows of ids that grow by a token a step, and the logits after each of them.

    Without `cached`, and for other models than `Transformer`, every step runs the whole window again. Raises ValueError
    for an empty prompt.
    """

    def __init__(
        self, model: Transformer | Logits, prompts: Sequence[Sequence[int]], context: int, *, cached: bool = True
    ) -> None:
        if not all(prompts):
            raise ValueError("a prompt of at least one token is needed")
        self.model, self.context = model, context
        self.rows = [list(prompt) for prompt in prompts]
        self._cached = cached and isinstance(model, Transformer)
        self._cache: Cache | None = None
        self._starts: list[int] = []
        self._device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Logits [B, V] of the token that comes next in each row; once before `append`, not twice."""
        starts = [self._start(len(row)) for row in self.rows]
        if self._cache is not None and starts == self._starts:
            assert isinstance(self.model, Transformer)
            ids = torch.tensor([row[-1:] for row in self.rows], device=self._device)
            return self.model.logits(self.model.features(ids, self._cache)[:, 0])
        windows = [row[start:] for row, start in zip(self.rows, starts, strict=True)]
        ids, last = pad(windows, self._device), torch.tensor([len(w) - 1 for w in windows], device=self._device)
        if not self._cached:
            return self.model(ids)[torch.arange(len(windows)), last]
        assert isinstance(self.model, Transformer)
        self._cache, self._starts = self.model.cache(len(windows)), starts
        features = self.model.features(ids, self._cache)
        self._cache.rewind([len(window) for window in windows])
        return self.model.logits(features[torch.arange(len(windows)), last])

    def append(self, ids: Sequence[int]) -> None:
        """One more id to each row."""
        for row, i in zip(self.rows, ids, strict=True):
            row.append(i)

    def _start(self, length: int) -> int:
        """Where the window of a row of this length starts: the same whether there is a cache or not."""
        jump = max(1, self.context // 2)
        return max(0, -(-(length - self.context) // jump) * jump)


def complete(
    writer: Writer, sampling: Sampling, max_tokens: int, finished: Callable[[int, list[int]], bool]
) -> list[list[int]]:
    """What follows each prompt, at most `max_tokens` ids, up to and with the one after which `finished(row, ids)`."""
    choose = sampling.sampler()
    written: list[list[int]] = [[] for _ in writer.rows]
    done = [False] * len(written)
    for _ in range(max_tokens):
        chosen = choose(writer.logits())
        writer.append(chosen)
        for row, i in enumerate(chosen):
            if not done[row]:
                written[row].append(i)
                done[row] = finished(row, written[row])
        if all(done):
            break
    return written


def stream(
    model: Transformer,
    codec: Codec,
    prompt: str,
    *,
    max_tokens: int = 200,
    sampling: Sampling | None = None,
    cached: bool = True,
) -> Iterator[str]:
    """Text that follows a prompt, piece by piece as it is written, until the end mark or `max_tokens`.

    `codec` is the tokenizer of the corpus the model was trained on. An empty prompt starts a new document. Characters
    are given out whole. Raises ConfigError for a prompt that is not text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"prompt is {prompt!r}: it is not text, it contains a lone surrogate") from None
    ids = codec.encode_batch([prompt])[0].tolist()
    choose = (sampling or Sampling()).sampler()
    writer, text = Writer(model, [ids or [codec.end_id]], model.context, cached=cached), TextPieces(codec)
    for _ in range(max_tokens):
        chosen = choose(writer.logits())
        if chosen[0] == codec.end_id:
            break
        writer.append(chosen)
        if piece := text.push(chosen[0]):
            yield piece
    if piece := text.rest():
        yield piece


class TextPieces:
    """Ids to text as they come: what may be the start of a character waits until it is one, or cannot be."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._pending: list[int] = []
        self._shown = 0

    def push(self, i: int) -> str:
        """The text that one more id makes certain."""
        self._pending.append(i)
        text = self._codec.decode(self._pending)
        whole = text.rstrip("\ufffd")
        piece = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if whole == text:
            self._pending, self._shown = [], 0
        return piece

    def rest(self) -> str:
        """Return what still waits, at the end."""
        return self._codec.decode(self._pending)[self._shown :]
