"""EleutherAI's lm-eval harness over our models: every task of it runs for those with a network.

`lm_eval` (extra `qa`) is imported inside functions only, so that this module loads without it.
"""

# lm_eval has no types.
# mypy: disable-error-code="import-untyped, misc"
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ablate.config import ConfigError
from ablate.data.tokens import Prepared
from ablate.evaluation import harness
from ablate.evaluation.generate import Sampling, Writer, complete
from ablate.evaluation.likelihood import Logits, Scorer
from ablate.model.transformer import Transformer

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

GENERATED = 256
"""Tokens generated where a task does not say how many (the harness's default), or half the context if that is less."""


def harness_model(model: Transformer, prepared: Prepared) -> TemplateLM:
    """Our transformer and its tokenizer as `lm_eval.api.model.LM`; `model` is left in eval mode."""
    scorer = Scorer(model.eval(), model.context)
    return wrap(scorer, encode=prepared.encode, decode=prepared.decode, end_id=prepared.end_id)


def wrap_logits(
    model: Logits,
    context: int,
    *,
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    end_id: int,
) -> TemplateLM:
    """Any causal model, a callable from ids [B, T] to logits [B, T, V] with T up to `context`, for the harness.

    `end_id` comes before a text without context, as in the harness's Hugging Face adapter.
    """
    return wrap(Scorer(model, context), encode=encode, decode=decode, end_id=end_id)


def wrap(
    scorer: Scorer, *, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str], end_id: int
) -> TemplateLM:
    """A scorer as the harness's LM. Raises ConfigError where `lm_eval` is not installed."""
    lm: TemplateLM = _class()(scorer, encode, decode, end_id)
    return lm


@functools.cache
def _class() -> Any:
    """The subclass of lm_eval's LM; made on first use."""
    harness.require()
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Harness(TemplateLM):
        """Splits, truncates and answers as the harness's Hugging Face adapter does."""

        def __init__(
            self,
            scorer: Scorer,
            encode: Callable[[str], list[int]],
            decode: Callable[[Sequence[int]], str],
            end_id: int,
        ) -> None:
            super().__init__()
            self.scorer = scorer
            # The choices of a question come one after the other, each with the same context.
            self._encode = functools.lru_cache(maxsize=16)(lambda text: tuple(encode(text)))
            self._decode, self._end_id = decode, end_id

        @property
        def eot_token_id(self) -> int:
            return self._end_id

        @property
        def max_length(self) -> int:
            return self.scorer.context

        @property
        def max_gen_toks(self) -> int:
            return min(GENERATED, self.max_length // 2)

        @property
        def device(self) -> torch.device:
            return self.scorer.device

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
            return list(self._encode(string))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return answers

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **unused: Any
        ) -> list[tuple[float, bool]]:
            scores = self.scorer.score([(context, continuation) for _, context, continuation in requests])
            answers = [(score.total, score.greedy) for score in scores]
            for (text, _, _), answer in zip(requests, answers, strict=True):
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answer)
            return answers

        def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            windows: list[tuple[int, tuple[list[int], list[int]]]] = []
            for i, text in enumerate(texts):
                rolling = get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                windows += [(i, make_disjoint_window(window)) for window in rolling]
            totals = [0.0] * len(texts)
            for (i, _), scored in zip(windows, self.scorer.score([w for _, w in windows]), strict=True):
                totals[i] += scored.total
            for text, total in zip(texts, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            return totals

        def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
            asked = [request.args for request in requests]
            answers: list[str] = [""] * len(asked)
            groups: dict[str, list[int]] = {}
            for i, (_, asked_for) in enumerate(asked):
                groups.setdefault(repr(sorted(asked_for.items())), []).append(i)
            for members in groups.values():
                keywords: dict[str, Any] = normalize_gen_kwargs(asked[members[0]][1], self.max_gen_toks)
                until = handle_stop_sequences(keywords.pop("until", None), eos=None)
                wanted = int(keywords.pop("max_gen_toks"))
                room = self.max_length - wanted
                if room < 1:
                    raise ConfigError(
                        f"max_gen_toks is {wanted}: the model's context is {self.max_length} tokens, and the task "
                        "needs some of them for its question"
                    )
                sampling = _sampling(keywords)
                ids = {i: (self.tok_encode(asked[i][0]) or [self._end_id])[-room:] for i in members}
                ordered = sorted(members, key=lambda i: -len(ids[i]))
                rows = max(1, self.scorer.batch_tokens // self.max_length)
                for first in range(0, len(ordered), rows):
                    batch = ordered[first : first + rows]
                    writer = Writer(self.scorer.model, [ids[i] for i in batch], self.max_length)

                    def finished(_: int, written: list[int], until: list[str] = until) -> bool:
                        return written[-1] == self._end_id or any(u and u in self._decode(written) for u in until)

                    for i, written in zip(batch, complete(writer, sampling, wanted, finished), strict=True):
                        kept = written[:-1] if written[-1] == self._end_id else written
                        answers[i] = postprocess_generated_text(self._decode(kept), until, None)
                        self.cache_hook.add_partial("generate_until", asked[i], answers[i])
            return answers

    return Harness


def _sampling(keywords: dict[str, Any]) -> Sampling:
    """From the harness's generation settings; raises ConfigError for one that changes results and is not known here."""
    known = {"do_sample", "temperature", "top_k", "seed"}
    if not keywords["do_sample"]:
        return Sampling()
    if unknown := sorted(keywords.keys() - known):
        raise ConfigError(f"generation_kwargs has {', '.join(unknown)}: sampling here knows {', '.join(sorted(known))}")
    return Sampling(float(keywords.get("temperature", 1.0)), keywords.get("top_k"), int(keywords.get("seed", 0)))
