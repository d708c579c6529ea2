"""Streamed training data: the windows of an uninterrupted stream, from any position, on any rank."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ablate.config import ConfigError, Corpus, Trial, parse
from ablate.data.codec import ByteCodec
from ablate.data.module import TokenData
from ablate.data.stream import Position, StreamData, TokenStream, open_stream
from ablate.data.tokens import prepare, split_of
from ablate.results.layout import LAST
from ablate.training.checkpoint import read_checkpoint
from ablate.training.trial import run_trial
from tests.data.conftest import text

CONTEXT = 24


def documents(file: int, count: int = 40) -> list[str]:
    """Of different lengths, an empty one among them; longer and shorter than a window."""
    return ["" if i == 7 else text(1000 * file + i, words=1 + (7 * i) % 60) for i in range(count)]


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("shards")
    for file in range(3):
        rows = [{"text": t} for t in documents(file)]
        if request.param == "jsonl":
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        else:
            pl.DataFrame(rows).write_parquet(folder / f"{file}.parquet", row_group_size=9)
    return Corpus(source="files", path=str(folder), tokenizer="bytes", validation_share=0.2, test_share=0.1)


def stream(corpus: Corpus, **changes: Any) -> TokenStream:
    cache = Path(str(corpus.path)) / ".cache"
    return TokenStream(corpus, ByteCodec(), cache, **{"context": CONTEXT, "seed": 3, "shuffle": 8, **changes})


def take(
    source: TokenStream, count: int, position: Position | None = None
) -> list[tuple[np.ndarray[Any, Any], Position]]:
    windows: Iterator[Any] = source.windows(position or source.start())
    return list(itertools.islice(windows, count))


def texts_of(corpus: Corpus, split: str) -> set[bytes]:
    every = [t for file in range(3) for t in documents(file) if t]
    return {t.encode() for t in every if split_of(hashlib.sha256(t.encode()).digest(), corpus) == split}


def unshuffled(source: TokenStream, windows: int) -> bytes:
    """The text behind consecutive windows, end marks as newlines."""
    ids = np.concatenate([w[:-1] for w, _ in take(source, windows)])
    return bytes(np.where(ids == ByteCodec.end_id, 0, ids).astype(np.uint8))


def test_a_pass_holds_each_training_document_once_and_none_that_is_held_out(corpus: Corpus) -> None:
    wanted = texts_of(corpus, "train")
    total = sum(len(t) + 1 for t in wanted)
    seen = unshuffled(stream(corpus, shuffle=1), total // CONTEXT + 1).split(b"\0")
    # The pass ends within the last window; what follows belongs to the next one.
    assert set(seen[: len(wanted)]) == wanted


def test_windows_overlap_by_the_one_token_that_is_target_here_and_input_there(corpus: Corpus) -> None:
    windows = [w for w, _ in take(stream(corpus, shuffle=1), 200)]
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(windows))
    assert {w.shape for w in windows} == {(CONTEXT + 1,)}
    assert windows[0].dtype == np.int64


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_from_any_saved_position_the_stream_goes_on_as_if_uninterrupted(corpus: Corpus, world_size: int) -> None:
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        whole = take(stream(corpus, **place), 500)  # several epochs
        for cut in (0, 6, 7, 8, 101, 250, 333):
            saved = Position.model_validate_json(whole[cut][1].model_dump_json())
            rest = take(stream(corpus, **place), 40, saved)
            for (resumed, _), (expected, _) in zip(rest, whole[cut + 1 : cut + 41], strict=True):
                assert np.array_equal(resumed, expected), (rank, cut)
            # A resumed stream's own positions are as good.
            again = take(stream(corpus, **place), 20, rest[19][1])
            for (resumed, _), (expected, _) in zip(again, whole[cut + 21 : cut + 41], strict=True):
                assert np.array_equal(resumed, expected), (rank, cut)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_documents_without_overlap(corpus: Corpus, world_size: int) -> None:
    """Three shards: each of three ranks gets one; two ranks take every second document."""
    wanted, parts = texts_of(corpus, "train"), []
    for rank in range(world_size):
        source = stream(corpus, shuffle=1, rank=rank, world_size=world_size)
        ids: list[int] = []
        for window, position in source.windows(source.start()):
            ids += window[:-1].tolist()
            if position.epoch:
                break
        parts.append(set(bytes(0 if i == 256 else i for i in ids).split(b"\0")[:-1]) & wanted)
    assert all(not a & b for a, b in itertools.combinations(parts, 2))
    # The last document of a rank may end within the window in which the epoch turned.
    assert len(wanted - set().union(*parts)) <= world_size


def test_blocks_are_shuffled_by_the_seed(corpus: Corpus) -> None:
    plain, one, other = (take(stream(corpus, **s), 8) for s in ({"shuffle": 1}, {}, {"seed": 4}))
    rows = [sorted(w.tolist() for w, _ in block) for block in (plain, one, other)]
    assert rows[0] == rows[1] == rows[2]
    assert len({tuple(map(tuple, (w.tolist() for w, _ in block))) for block in (plain, one, other)}) == 3


@pytest.mark.parametrize("change", [{"seed": 4}, {"context": 12}, {"shuffle": 4}, {"world_size": 2}])
def test_a_position_of_another_stream_is_refused(corpus: Corpus, change: dict[str, Any]) -> None:
    position = take(stream(corpus), 3)[-1][1]
    with pytest.raises(ConfigError, match="is of another stream"):
        take(stream(corpus, **change), 1, position)


def test_what_cannot_be_streamed_is_said(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus.source is 'stdlib'"):
        open_stream(Corpus(), tmp_path)
    with pytest.raises(ConfigError, match="stream is true: it needs source"):
        parse(Trial, {"corpus": {"stream": True}})
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"streaming takes .jsonl or .parquet, not \['.txt'\]"):
        open_stream(Corpus(source="files", path=str(tmp_path)), tmp_path)
    with pytest.raises(ConfigError, match=r"corpus.text_field is 'body': (not among its fields|no such column)"):
        take(stream(corpus.model_copy(update={"text_field": "body"})), 1)
    with pytest.raises(ConfigError, match="gave no training document"):
        take(stream(_empty(tmp_path)), 1)


def _empty(tmp_path: Path) -> Corpus:
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.jsonl").write_text('{"text": " "}\n')
    return Corpus(source="files", path=str(tmp_path / "blank"), tokenizer="bytes")


def test_batches_come_from_the_stream_and_evaluation_from_the_sample(corpus: Corpus, tmp_path: Path) -> None:
    prepared = prepare(corpus, tmp_path)
    given: dict[str, Any] = {
        "context": CONTEXT,
        "batch_size": 4,
        "data_seed": 3,
        "steps": 9,
        "eval_tokens": 96,
        "eval_batch_size": 2,
    }
    data = StreamData(prepared, corpus, tmp_path / ".cache", shuffle=8, **given)
    batches = [b["tokens"] for b in data.train_dataloader()]
    expected = [w for w, _ in take(stream(corpus), 36)]
    assert torch.equal(torch.cat(batches), torch.from_numpy(np.stack(expected)))
    assert torch.equal(data.probe_windows, TokenData(prepared, **given).probe_windows)
    with pytest.raises(ConfigError, match="after micro-step 90 is not known: 0 to 9 are"):
        data.position(90)
    # From the state at step 5, the rest.
    later = StreamData(prepared, corpus, tmp_path / ".cache", shuffle=8, **{**given, "start_step": 5})
    later.load_state_dict({"positions": json.dumps([data.position(5).model_dump(mode="json")])})
    assert torch.equal(torch.cat([b["tokens"] for b in later.train_dataloader()]), torch.cat(batches[5:]))
    later.load_state_dict({"positions": json.dumps([{}, {}])})
    with pytest.raises(ConfigError, match="positions of 2 ranks: this run has 1"):
        next(iter(later.train_dataloader()))


class _StopAt:
    """An observer that asks to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def evaluated(self, evaluation: Any) -> bool:
        return False

    def stepped(self, step: int, steps: int) -> bool:
        return step == self.step


def test_an_interrupted_trial_on_a_stream_ends_like_an_uninterrupted_one(corpus: Corpus, tmp_path: Path) -> None:
    trial = Trial.model_validate(
        {
            "corpus": {**corpus.model_dump(), "stream": True, "max_documents": 60},
            "model": {"d_model": 16, "blocks": 1, "heads": 2, "context": CONTEXT},
            "tree": {"trees": 1, "depth": 2, "leaf_width": 2},
            "train": {
                "steps": 8,
                "batch_size": 4,
                "accumulate": 2,
                "eval_every": 4,
                "eval_tokens": 256,
                "checkpoint_every": 100,
            },
        }
    )
    whole = run_trial(trial, data_root=tmp_path / "data", folder=tmp_path / "whole", threads=1)
    stopped = run_trial(trial, data_root=tmp_path / "data", folder=tmp_path / "cut", observer=_StopAt(3), threads=1)
    assert stopped.status == "killed"
    state = read_checkpoint(tmp_path / "cut" / LAST)["StreamData"]
    assert len(json.loads(state["positions"])) == 1
    resumed = run_trial(trial, data_root=tmp_path / "data", folder=tmp_path / "cut", threads=1)
    assert [(e.step, e.bpb, e.train_loss) for e in resumed.history] == [
        (e.step, e.bpb, e.train_loss) for e in whole.history
    ]
    assert resumed.status == whole.status == "finished"
