"""Generation: what the cache leaves out changes nothing, and text comes whole."""

from __future__ import annotations

import pytest
import torch

from ablate.config import ConfigError, Corpus, Trial
from ablate.data.codec import ByteCodec
from ablate.evaluation.generate import Sampling, TextPieces, Writer, complete, stream
from ablate.model.transformer import Transformer
from tests.evaluation.conftest import Trained


def model(feedforward: str, dtype: torch.dtype) -> Transformer:
    trial = Trial.model_validate(
        {
            "corpus": Corpus(tokenizer="bytes"),
            "model": {"d_model": 24, "blocks": 2, "heads": 2, "context": 16, "feedforward": feedforward},
            "tree": {"trees": 3, "depth": 4, "leaf_width": 3},
        }
    )
    net = Transformer(trial, ByteCodec.vocab_size).to(dtype).eval()
    with torch.no_grad():
        net.embedding.mul_(50)
    return net


PROMPTS = [[1, 2, 3], [7], list(range(40)), list(range(50, 66))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("feedforward", ["tree", "dense", "none"])
def test_logits_with_a_cache_equal_those_without(feedforward: str, dtype: torch.dtype) -> None:
    net = model(feedforward, dtype)
    with_cache, without = Writer(net, PROMPTS, 16), Writer(net, PROMPTS, 16, cached=False)
    spread = 0.0
    for _ in range(40):  # well past the context, so that every row's window moves
        a, b = with_cache.logits(), without.logits()
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 if dtype == torch.float32 else 1e-11)
        spread = max(spread, float(b.std()))
        chosen = b.argmax(-1).tolist()
        with_cache.append(chosen)
        without.append(chosen)
    assert spread > 1  # logits of that size would not agree by accident
    assert with_cache.rows == without.rows


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=3), Sampling(1.2, top_k=5, seed=4)], ids=repr)
def test_written_tokens_equal_those_without_a_cache(sampling: Sampling) -> None:
    net = model("tree", torch.float64)
    written = [
        complete(Writer(net, PROMPTS, 16, cached=cached), sampling, 40, lambda row, ids: row == 0 and len(ids) == 5)
        for cached in (True, False)
    ]
    assert written[0] == written[1]
    assert [len(ids) for ids in written[0]] == [5, 40, 40, 40]


def test_a_batch_writes_what_each_prompt_writes_alone() -> None:
    net = model("tree", torch.float64)
    together = complete(Writer(net, PROMPTS, 16), Sampling(), 20, lambda row, ids: False)
    alone = [complete(Writer(net, [p], 16), Sampling(), 20, lambda row, ids: False)[0] for p in PROMPTS]
    assert together == alone


def test_sampling_follows_its_seed_and_its_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 1.0, -1.0]]).repeat(4000, 1)
    draw = Sampling(temperature=0.7, top_k=3, seed=1).sampler()(logits)
    assert draw == Sampling(temperature=0.7, top_k=3, seed=1).sampler()(logits)
    assert draw != Sampling(temperature=0.7, top_k=3, seed=2).sampler()(logits)
    share = torch.bincount(torch.tensor(draw), minlength=5) / 4000
    expected = torch.tensor([2.0, 1.0, -torch.inf, 1.0, -torch.inf]).div(0.7).softmax(0)
    assert share[[2, 4]].tolist() == [0, 0]
    torch.testing.assert_close(share, expected, rtol=0, atol=0.03)
    assert Sampling().sampler()(torch.tensor([[0.0, 3.0, 3.0]])) == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "is nan"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_sampling_refuses_what_has_no_meaning(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_the_stream_is_the_text_and_stops_at_the_end_mark(trained: Trained) -> None:
    prompt = trained.own.held_out("validation")["text"][0][:80]
    pieces = list(stream(trained.model, trained.own.codec, prompt, max_tokens=60))
    ids = complete(
        Writer(trained.model, [trained.own.encode(prompt)], trained.model.context),
        Sampling(),
        60,
        lambda row, ids: ids[-1] == trained.own.end_id,
    )[0]
    assert "".join(pieces) == trained.own.decode(ids)
    assert len(pieces) > 10
    assert "".join(stream(trained.model, trained.own.codec, prompt, max_tokens=60, cached=False)) == "".join(pieces)
    assert list(stream(trained.model, trained.own.codec, "", max_tokens=3))
    with pytest.raises(ConfigError, match="lone surrogate"):
        next(stream(trained.model, trained.own.codec, "\ud800"))


@pytest.mark.parametrize("text", ["plain", "naïve — “quotes” 🙂🙂 汉字", "\ufffd kept \ufffd"])
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    text_pieces = TextPieces(ByteCodec())
    pieces = [text_pieces.push(byte) for byte in text.encode()]
    pieces.append(text_pieces.rest())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
