"""The harness's own Hugging Face adapter on a tiny GPT-2, and ours on the same model: the same answers."""

# lm_eval has no types.
# mypy: disable-error-code="import-untyped"
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ablate.config import ConfigError, Trial
from ablate.evaluation.likelihood import Scorer
from ablate.evaluation.qa import wrap, wrap_logits
from ablate.model.transformer import Transformer

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

CONTEXT = 32
TEXT = " ".join(f"def test_{i}(value: int) -> None: return value + {i * i}  # line {i}," for i in range(60))


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=a) for a in arguments]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    end = AddedToken("<|endoftext|>", special=True, normalized=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    plain.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="module")
def gpt2(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def theirs(gpt2: Any, tokenizer: Any) -> Any:
    pytest.importorskip("accelerate", reason="the harness's Hugging Face adapter needs it")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=gpt2, tokenizer=tokenizer, batch_size=3, max_length=CONTEXT)


@pytest.fixture(scope="module")
def ours(gpt2: Any, tokenizer: Any) -> Any:
    return wrap_logits(
        lambda ids: gpt2(ids).logits,
        CONTEXT,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        end_id=tokenizer.eos_token_id,
    )


PAIRS = [
    ("from __future__", " import annotations"),
    ("from __future__", " import"),
    ("from __future__", " import annotation"),
    ("trailing space ", "moves over"),
    ("", "no context at all"),
    (TEXT[:400], " a context longer than the model"),  # cut from the left
    (TEXT[:400], TEXT[400:430]),
    ("same", " a"),
    ("same", " b"),
    ("ünï", "cöde \u00e9"),
]


def test_log_likelihoods_equal_the_harness(theirs: Any, ours: Any) -> None:
    expected, got = (
        theirs.loglikelihood(requests(*PAIRS), disable_tqdm=True),
        ours.loglikelihood(requests(*PAIRS), disable_tqdm=True),
    )
    for (a, greedy_a), (b, greedy_b), pair in zip(expected, got, PAIRS, strict=True):
        assert abs(a - b) <= 1e-4, pair
        assert greedy_a == greedy_b, pair
    assert ours.scorer.truncated == 3  # the two long contexts, and the one spelled in bytes


def test_greedy_continuations_are_seen_as_such(theirs: Any, ours: Any, gpt2: Any, tokenizer: Any) -> None:
    context = "pytest.importorskip"
    start = torch.tensor([tokenizer.encode(context)])
    written = gpt2.generate(start, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)[
        0, start.shape[1] :
    ]
    asked = [
        ((context, "?"), start[0].tolist(), written.tolist()),
        ((context, "!"), start[0].tolist(), [*written[:5].tolist(), 7]),
    ]
    expected, got = theirs._loglikelihood_tokens(asked, disable_tqdm=True), ours._loglikelihood_tokens(asked)
    assert [g for _, g in got] == [g for _, g in expected] == [True, False]
    assert [ll for ll, _ in got] == pytest.approx([ll for ll, _ in expected], abs=1e-4)


def test_rolling_log_likelihoods_equal_the_harness(theirs: Any, ours: Any) -> None:
    texts = requests(("short",), (TEXT[:1000],), (TEXT[:90],))
    expected, got = theirs.loglikelihood_rolling(texts, disable_tqdm=True), ours.loglikelihood_rolling(texts)
    # A thousand characters are some hundred tokens: 1e-4 holds for each of their windows.
    assert got == pytest.approx(expected, abs=1e-3, rel=1e-6)
    assert len(got) == 3


def test_generated_text_equals_the_harness(theirs: Any, ours: Any) -> None:
    asked = requests(
        ("def test", {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}),
        ("import torch and", {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}),
        (TEXT[:300], {"until": ["zzz"], "max_gen_toks": 10}),
        ("class", {"until": [], "max_gen_toks": 10}),
    )
    expected, got = theirs.generate_until(asked, disable_tqdm=True), ours.generate_until(asked)
    assert got == expected
    assert all(got[2:])


def test_what_cannot_be_asked_is_said(ours: Any) -> None:
    with pytest.raises(ConfigError, match="max_gen_toks is 32: the model's context is 32"):
        ours.generate_until(requests(("a", {"until": [], "max_gen_toks": 32})))
    with pytest.raises(ConfigError, match="generation_kwargs has top_p"):
        ours.generate_until(requests(("a", {"until": [], "max_gen_toks": 3, "do_sample": True, "top_p": 0.5})))
    with pytest.raises(ValueError, match="model's context is 32"):
        ours.loglikelihood(requests(("a", TEXT[:400])), disable_tqdm=True)


# --- our transformer: the cache shares contexts, and the answers stay those of whole inputs


def transformer(feedforward: str) -> Transformer:
    trial = Trial.model_validate(
        {
            "model": {"d_model": 24, "blocks": 2, "heads": 2, "context": CONTEXT, "feedforward": feedforward},
            "tree": {"trees": 3, "depth": 4, "leaf_width": 3},
        }
    )
    net = Transformer(trial, 97).double().eval()
    with torch.no_grad():
        net.embedding.mul_(50)
    return net


def pairs() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(97, (n,), generator=generator).tolist()

    shared, long = ids(11), ids(60)
    mixed = [(ids(c), ids(e)) for c, e in [(1, 1), (1, 32), (32, 1), (31, 2), (5, 9), (2, 30), (50, 20), (31, 32)]]
    return [
        *mixed,
        *((shared, ids(n)) for n in (1, 3, 8)),
        *((long, ids(n)) for n in (1, 1, 5)),
        (shared, [3]),
        (shared, [3]),
    ]


@pytest.mark.parametrize("feedforward", ["tree", "dense"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 16384])
def test_shared_contexts_change_no_score(feedforward: str, batch_tokens: int) -> None:
    net, asked = transformer(feedforward), pairs()
    got = Scorer(net, CONTEXT, batch_tokens=batch_tokens).score(asked)
    whole = Scorer(lambda ids: net(ids), CONTEXT).score(asked)
    alone = [Scorer(lambda ids: net(ids), CONTEXT).score([pair])[0] for pair in asked]
    for a, b, c, (context, continuation) in zip(got, whole, alone, asked, strict=True):
        ids = torch.tensor([(context + continuation)[-CONTEXT - 1 :]])
        logp = net(ids[:, :-1])[0].detach().float().log_softmax(-1).double()[-len(continuation) :]
        expected = float(logp.gather(1, torch.tensor(continuation)[:, None]).sum())
        assert a.total == pytest.approx(expected, abs=1e-4)
        assert b.total == pytest.approx(expected, abs=1e-4)
        assert a.greedy == b.greedy == c.greedy == bool((logp.argmax(-1) == torch.tensor(continuation)).all())


def test_a_context_shared_by_choices_is_computed_once() -> None:
    net, seen = transformer("dense"), 0

    def count(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += inputs[0].shape[0] * inputs[0].shape[1]

    net.blocks[0].register_forward_pre_hook(count)
    Scorer(net, CONTEXT).score([(list(range(28)), [i, i + 1]) for i in range(10)])
    assert seen == 28 + 10 * 2


def test_generate_until_with_a_cache_equals_without() -> None:
    net = transformer("tree")

    def decode(ids: Any) -> str:
        return "".join(chr(33 + i) for i in ids)

    def encode(text: str) -> list[int]:
        return [ord(c) - 33 for c in text]

    asked = requests(
        *((decode(context[:n]), {"until": ["%"], "max_gen_toks": 20}) for n, (context, _) in enumerate(pairs()[2:8], 1))
    )
    cached = wrap(Scorer(net, CONTEXT), encode=encode, decode=decode, end_id=96).generate_until(asked)
    plain = wrap_logits(lambda ids: net(ids), CONTEXT, encode=encode, decode=decode, end_id=96).generate_until(asked)
    assert cached == plain
    assert len(set(cached)) > 1
