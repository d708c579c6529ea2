"""Preparation: splits, packing, the bytes behind tokens, repeatability, and damaged folders."""

# Longer than 400 lines because all of it prepares small corpora with the helpers at its head.
from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from ablate.config import ConfigError, Corpus
from ablate.data import codec as codecs
from ablate.data import corpora, tokens
from ablate.data.tokens import SPLITS, Prepared, load, prepare
from tests.data.conftest import text

Write = Callable[..., Corpus]
TRAINED = codecs.train(iter([[text(i) for i in range(40)]]), 320)
ADDED = {"id": 320, "content": "leaf", "single_word": False, "rstrip": False, "normalized": False, "special": False}


def fails(corpus: Corpus, root: Path, action: Callable[..., Prepared] = prepare) -> str:
    with pytest.raises(ConfigError) as caught:
        action(corpus, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pieces(stream: Any, end: int) -> list[list[int]]:
    """A stream cut at its end marks."""
    found: list[list[int]] = [[]]
    for i in stream.tolist():
        if i == end:
            found.append([])
        else:
            found[-1].append(i)
    assert found.pop() == []
    return found


# --- what a prepared corpus is


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_streams_hold_every_document_of_their_split_in_order_and_nothing_else(
    write: Write, tmp_path: Path, tokenizer: str
) -> None:
    corpus = write(tokenizer=tokenizer)
    done = prepare(corpus, tmp_path / "root")
    texts = {d.name: d.text for d in corpora.documents(corpus, tmp_path / "cache")}
    table = done.documents().collect()
    assert table["name"].to_list() == list(texts)
    for split in SPLITS:
        stream = getattr(done, split)
        assert stream.dtype == np.uint16
        assert not stream.flags.writeable
        rows = table.filter(pl.col("split") == split)
        found = pieces(stream, done.end_id)
        assert [done.decode(ids) for ids in found] == [texts[name] for name in rows["name"]]
        assert [len(ids) for ids in found] == rows["tokens"].to_list()
        assert (
            done.token_bytes[stream].sum() == rows["bytes"].sum() == sum(len(texts[n].encode()) for n in rows["name"])
        )
        card = done.card["splits"][split]
        assert (card["documents"], card["bytes"], card["tokens"]) == (
            len(rows),
            rows["bytes"].sum(),
            rows["tokens"].sum(),
        )
        assert len(rows) > 3
    assert done.vocab_size == (257 if tokenizer == "bytes" else 300) == len(done.token_bytes)
    assert done.token_bytes[done.end_id] == 0


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_its_closed_form(write: Write, tmp_path: Path) -> None:
    done = prepare(write(tokenizer="bytes"), tmp_path / "root")
    nll = len(done.validation) * math.log(257)
    text_bytes = int(done.token_bytes[done.validation].sum())
    documents = done.card["splits"]["validation"]["documents"]
    assert nll / (math.log(2) * text_bytes) == pytest.approx(math.log2(257) * (text_bytes + documents) / text_bytes)


def test_token_bytes_are_the_bytes_a_token_decodes_to(write: Write, tmp_path: Path) -> None:
    done = prepare(write(), tmp_path / "root")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer.from_file(str(done.folder / "tokenizer.json"))
    for i in range(done.vocab_size):
        token = tokenizer.id_to_token(i) or ""
        assert done.token_bytes[i] == (0 if i == done.end_id else len(token))
        assert i == done.end_id or set(token) <= set(alphabet)
    assert done.token_bytes.max() > 3


def test_held_out_texts_can_be_had_and_training_texts_are_not_kept(write: Write, tmp_path: Path) -> None:
    corpus = write()
    done = prepare(corpus, tmp_path / "root")
    texts = {d.name: d.text for d in corpora.documents(corpus, tmp_path / "cache")}
    table = done.documents().collect()
    for split in ("validation", "test"):
        kept = done.held_out(split)
        assert kept["name"].to_list() == table.filter(pl.col("split") == split)["name"].to_list()
        assert kept["text"].to_list() == [texts[name] for name in kept["name"]]


def test_card_records_source_hashes_and_licence(write: Write, tmp_path: Path) -> None:
    done = prepare(write(), tmp_path / "root")
    told = json.loads(json.dumps(tokens.describe(done)))
    assert told["folder"] == str(done.folder)
    assert told["source"]["source"] == "files"
    assert told["licence"] == "unknown: the user's own files"
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["data_hash"] == done.data_hash
    assert told["tokenizer"]["hash"] == done.tokenizer_hash
    assert len({done.data_hash, done.tokenizer_hash}) == 2
    total = sum(told["splits"][s]["bytes"] for s in SPLITS)
    assert told["tokenizer"]["tokens_per_byte"] == sum(told["splits"][s]["tokens"] for s in SPLITS) / total
    assert "files" not in told


def test_progress_reaches_the_end_of_each_stage(write: Write, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    done = prepare(write(), tmp_path / "root", progress=lambda *step: seen.append(step))
    total = sum(s["bytes"] for s in done.card["splits"].values())
    last = {stage: (now, of) for stage, now, of in seen}
    train = done.card["splits"]["train"]["bytes"]
    assert last == {"read": (total, total), "train tokenizer": (train, train), "encode": (total, total)}


# --- duplicates and splits


def test_duplicates_and_blank_documents_are_dropped(write: Write, tmp_path: Path) -> None:
    corpus = write()
    before = prepare(corpus, tmp_path / "root")
    folder = Path(corpus.path or "")
    for i in range(7):
        (folder / f"9{i}.txt").write_text(text(i), encoding="utf-8")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "nothing.txt").write_text("")
    after = prepare(corpus, tmp_path / "root")
    assert after.folder != before.folder
    assert after.data_hash == before.data_hash
    assert np.array_equal(after.train, before.train)
    assert (after.card["duplicates_dropped"], after.card["empty_dropped"]) == (7, 2)


def test_a_document_is_in_the_same_split_whatever_its_place_name_and_company(write: Write, tmp_path: Path) -> None:
    first = prepare(write(), tmp_path / "root").documents().collect()
    rows = [{"text": text(i), "title": "x"} for i in range(200, 20, -1)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus(source="files", path=str(tmp_path / "other.jsonl"), validation_share=0.2, test_share=0.1)
    second = prepare(corpus, tmp_path / "root").documents().collect()
    both = first.join(second, on="id")
    assert len(both) == 99
    assert (both["split"] == both["split_right"]).all()
    assert both["split"].n_unique() == 3


def test_shares_are_kept_and_a_new_share_moves_no_document_between_the_other_splits() -> None:
    contents = [os.urandom(32) for _ in range(20000)]
    base = Corpus(validation_share=0.05, test_share=0.02)
    splits = [tokens.split_of(c, base) for c in contents]
    # three standard deviations of a binomial share
    assert splits.count("validation") / 20000 == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 20000))
    assert splits.count("test") / 20000 == pytest.approx(0.02, abs=3 * math.sqrt(0.02 * 0.98 / 20000))
    wider = [tokens.split_of(c, Corpus(validation_share=0.05, test_share=0.2)) for c in contents]
    assert {(a, b) for a, b in zip(splits, wider, strict=True) if a != b} == {("train", "test")}


def test_max_documents_counts_unique_ones(write: Write, tmp_path: Path) -> None:
    corpus = write()
    (Path(corpus.path or "") / "0000a.txt").write_text(text(0), encoding="utf-8")
    done = prepare(corpus.model_copy(update={"max_documents": 60}), tmp_path / "root")
    assert len(done.documents().collect()) == 60
    assert done.card["duplicates_dropped"] == 1


# --- repeatability


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_preparing_twice_is_the_same_to_the_byte_whatever_the_threads(write: Write, tmp_path: Path) -> None:
    corpus = write()
    one = prepare(corpus, tmp_path / "one")
    code = (
        "import sys; from pathlib import Path; from ablate.config import Corpus;"
        "from ablate.data.tokens import prepare;"
        "prepare(Corpus.model_validate_json(sys.argv[1]), Path(sys.argv[2]))"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "7", "POLARS_MAX_THREADS": "3", "PYTHONHASHSEED": "5"}
    command = [sys.executable, "-c", code, corpus.model_dump_json(), str(tmp_path / "two")]
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert contents(one.folder) == contents(tmp_path / "two" / one.folder.name)


def test_a_corpus_read_in_many_parts_is_the_same(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write()
    one = prepare(corpus, tmp_path / "one")
    monkeypatch.setattr(tokens, "PART_BYTES", 1000)
    monkeypatch.setattr(tokens, "BATCH_BYTES", 400)
    two = prepare(corpus, tmp_path / "two")
    for split in SPLITS:
        assert np.array_equal(getattr(one, split), getattr(two, split))
    assert one.documents().collect().equals(two.documents().collect())
    assert one.held_out("test").equals(two.held_out("test"))
    assert (one.data_hash, one.tokenizer_hash) == (two.data_hash, two.tokenizer_hash)


def test_the_tokenizer_sees_the_training_split_only(write: Write, tmp_path: Path) -> None:
    corpus = write()
    before = prepare(corpus, tmp_path / "root")
    for row in before.documents().filter(pl.col("split") != "train").collect().iter_rows(named=True):
        (Path(corpus.path or "") / row["name"]).unlink()
    held_out = [i for i in range(1000, 1100) if _split(f"{i} zqzqzqzqzq", corpus) != "train"]
    assert len(held_out) > 10
    for i in held_out:
        (Path(corpus.path or "") / f"{i}.txt").write_text(f"{i} zqzqzqzqzq")
    after = prepare(corpus, tmp_path / "root")
    assert after.tokenizer_hash == before.tokenizer_hash
    assert after.data_hash != before.data_hash


def _split(content: str, corpus: Corpus) -> str:
    return tokens.split_of(hashlib.sha256(content.encode()).digest(), corpus)


def test_prepare_opens_what_is_there_and_force_makes_it_anew(write: Write, tmp_path: Path) -> None:
    corpus, root = write(), tmp_path / "root"
    first = prepare(corpus, root)
    made = (first.folder / "card.json").stat().st_ino
    assert (prepare(corpus, root).folder / "card.json").stat().st_ino == made
    before = contents(first.folder)
    again = prepare(corpus, root, force=True)
    assert (again.folder / "card.json").stat().st_ino != made
    assert contents(again.folder) == before
    assert [p.name for p in root.iterdir() if p.is_dir() and p.name != ".cache"] == [first.folder.name]


def _prepare(given: tuple[str, str]) -> tuple[str, int]:
    done = prepare(Corpus.model_validate_json(given[0]), Path(given[1]))
    return done.data_hash, (done.folder / "card.json").stat().st_ino


def test_processes_that_prepare_at_once_share_one_folder(write: Write, tmp_path: Path) -> None:
    given = (write().model_dump_json(), str(tmp_path / "root"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(_prepare, [given] * 2, chunksize=1)
    assert len(set(results)) == 1


def test_an_interrupted_preparation_leaves_nothing_that_looks_ready(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, root = write(), tmp_path / "root"
    ready = prepare(corpus, root)
    before = contents(ready.folder)

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "encode":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, root, force=True, progress=stop)
    assert contents(load(corpus, root).folder) == before
    assert [p.name for p in root.iterdir() if p.is_dir() and p.name != ".cache"] == [ready.folder.name]


# --- the key


def test_every_setting_that_matters_gives_another_folder(write: Write, tmp_path: Path) -> None:
    corpus = write()
    changes: list[dict[str, Any]] = [
        {},
        {"vocab_size": 301},
        {"tokenizer": "bytes"},
        {"validation_share": 0.21},
        {"max_documents": 100},
    ]
    keys = {tokens.corpus_key(corpus.model_copy(update=change), tmp_path) for change in changes}
    assert len(keys) == len(changes)
    as_bytes = [tokens.corpus_key(write(tokenizer="bytes", vocab_size=v), tmp_path) for v in (300, 400)]
    assert as_bytes[0] == as_bytes[1]
    assert tokens.corpus_key(Corpus(), tmp_path) == tokens.corpus_key(Corpus(), tmp_path / "elsewhere")


# --- tokenizers


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=150)
def test_any_text_survives_encoding_and_its_bytes_are_counted(sample: str) -> None:
    for codec in (codecs.ByteCodec(), TRAINED):
        ids = codec.encode_batch([sample])[0]
        assert codec.decode(ids.tolist()) == sample
        assert codec.token_bytes[ids].sum() == len(sample.encode())


@pytest.mark.parametrize("spelling", [*codecs.KNOWN_ENDS, "a<|end|>b"])
def test_a_text_that_spells_the_end_mark_does_not_end_there(spelling: str) -> None:
    ids = TRAINED.encode_batch([spelling])[0]
    assert TRAINED.end_id not in ids
    assert TRAINED.decode(ids.tolist()) == spelling
    assert TRAINED.decode([TRAINED.end_id, *ids.tolist(), TRAINED.end_id]) == spelling


def test_a_text_too_small_for_the_vocabulary_gives_a_smaller_one(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = prepare(write(vocab_size=50000), tmp_path / "root")
    assert 257 < done.vocab_size < 50000
    assert done.vocab_size == len(done.token_bytes) == done.card["tokenizer"]["vocab_size"]
    assert max(int(getattr(done, s).max()) for s in SPLITS) < done.vocab_size
    assert f"corpus.vocab_size is 50000: the training text gives {done.vocab_size} entries" in caplog.text


def tokenizer_file(path: Path, change: Callable[[dict[str, Any]], Any] = lambda data: None) -> str:
    """A trained tokenizer, saved by the library, after a change of its JSON."""
    data = json.loads(TRAINED.content())
    change(data)
    path.write_text(json.dumps(data))
    return str(path)


def test_a_tokenizer_file_gives_the_same_ids_as_its_origin(write: Write, tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path / "t.json")
    done = prepare(write(tokenizer="file", tokenizer_file=file), tmp_path / "root")
    assert (done.vocab_size, done.end_id) == (TRAINED.vocab_size, TRAINED.end_id)
    assert done.encode(text(3)) == TRAINED.encode_batch([text(3)])[0].tolist()


def test_a_tokenizer_file_without_end_mark_gets_one(write: Write, tmp_path: Path) -> None:
    def without(data: dict[str, Any]) -> None:
        data["added_tokens"] = []
        data["model"]["vocab"]["unused"] = data["model"]["vocab"].pop(codecs.END)

    file = tokenizer_file(tmp_path / "t.json", without)
    done = prepare(write(tokenizer="file", tokenizer_file=file), tmp_path / "root")
    assert done.end_id == TRAINED.vocab_size == done.vocab_size - 1
    assert done.token_bytes[done.end_id] == 0
    assert done.decode(pieces(done.test, done.end_id)[0]).endswith("\n")


def test_ids_past_16_bits_are_stored_in_32(write: Write, tmp_path: Path) -> None:
    def far(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        vocab[":"] = 70_000  # always a token of its own

    file = tokenizer_file(tmp_path / "t.json", far)
    done = prepare(write(tokenizer="file", tokenizer_file=file), tmp_path / "root")
    assert done.vocab_size == 70_001
    assert done.train.dtype == np.uint32
    assert int(done.train.max()) == 70_000
    assert done.decode(pieces(done.test, done.end_id)[0]).endswith("\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"]["vocab"].update(x=2**31), "has token id 2147483648: ids up to 2147483646 fit"),
        (lambda d: d["model"]["vocab"].update(x=2**40), "has token id 1099511627776: ids up to 2147483646 fit"),
        (lambda d: d["model"].update(type="NoSuch"), "is not a tokenizer of the `tokenizers` library"),
        (lambda d: d.update(decoder=None), "is not byte-level"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "has a normalizer, which changes text"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "corpus.tokenizer_file changes text"),
        (lambda d: d["added_tokens"].append(ADDED | {"lstrip": True}), "corpus.tokenizer_file changes text"),
    ],
)
def test_tokenizer_files_that_cannot_be_used(
    write: Write, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    file = tokenizer_file(tmp_path / "t.json", change)
    corpus = write(tokenizer="file", tokenizer_file=file)
    assert message in fails(corpus, tmp_path / "root")


def test_tokenizers_that_are_not_byte_level_missing_or_no_json(write: Write, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "broken.json").write_text('{"model": ')
    (tmp_path / "binary.json").write_bytes(b"\xff\x00")
    cases = {
        "words.json": "is not byte-level: bits per byte needs the bytes behind every token",
        "broken.json": "is not JSON",
        "binary.json": "is not text in UTF-8: byte 0xff at line 1",
        "nosuch.json": "cannot be read: No such file or directory",
        ".": "cannot be read: it is no file",
    }
    for name, message in cases.items():
        path = str(tmp_path / name)
        told = fails(write(tokenizer="file", tokenizer_file=path), tmp_path / "root")
        assert told.startswith(f"corpus.tokenizer_file {path!r} {message}")


# --- corpora that cannot be used


def test_empty_and_too_small_corpora(write: Write, tmp_path: Path) -> None:
    corpus = write(count=0)
    folder = Path(corpus.path or "")
    (folder / "blank.txt").write_text("\n \n")
    assert "is empty: no document with text in it" in fails(corpus, tmp_path / "root")
    for missing, kind in (("validation", "train"), ("train", "validation")):
        (folder / "one.txt").write_text(next(str(i) for i in range(999) if _split(str(i), corpus) == kind))
        told = fails(corpus, tmp_path / "root")
        assert told.startswith(f"corpus has 1 document(s), none of them in {missing} (validation_share is 0.2)")
    assert not [p for p in (tmp_path / "root").iterdir() if p.is_dir() and p.name != ".cache"]


def test_a_few_documents_always_have_one_that_is_held_out(write: Write, tmp_path: Path) -> None:
    corpus = write(count=0)
    folder = Path(corpus.path or "")
    words = [word for word in (f"word {i}" for i in range(99)) if _split(word, corpus) == "train"][:5]
    for i, word in enumerate(words):
        (folder / f"{i}.txt").write_text(word)
    held = min(words, key=lambda word: hashlib.sha256(word.encode()).digest())
    table = pl.read_parquet(prepare(corpus, tmp_path / "root").folder / "documents.parquet")
    assert dict(zip(table["name"], table["split"], strict=True)) == {
        f"{i}.txt": "validation" if word == held else "train" for i, word in enumerate(words)
    }


def test_a_lone_surrogate_is_not_text(write: Write, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    told = fails(Corpus(source="files", path=str(tmp_path / "a.jsonl")), tmp_path / "root")
    assert "a.jsonl' line 1: corpus.text_field 'text' is not text: a lone surrogate U+D800 in it" in told


# --- damaged folders


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["train.bin", "validation.bin", "tokenizer.json", "token_bytes.npy", "documents.parquet"]
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "missing"), (truncate, "truncated: "), (flip, "corrupt: its content is not what was written")],
)
def test_a_damaged_file_is_named_with_the_remedy_and_the_remedy_works(
    write: Write, tmp_path: Path, name: str, damage: Callable[[Path], Any], message: str
) -> None:
    corpus, root = write(count=40, tokenizer="bytes"), tmp_path / "root"
    done = prepare(corpus, root)
    before = contents(done.folder)
    damage(done.folder / name)
    told = fails(corpus, root, load)
    assert told.startswith(f"token file {str(done.folder / name)!r} is {message}")
    assert told.endswith("; run `ablate prepare` to make it again")
    prepare(corpus, root)
    assert contents(load(corpus, root).folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "", "not a data card"),
        (lambda c: "[]", "not a data card"),
        (lambda c: c[:-30], "not a data card"),
        (lambda c: c.replace('"<u2"', '"<f4"'), "not a data card"),
        (lambda c: c.replace('"vocab_size": 257', '"vocab_size": 70000'), "larger than its integer type uint16"),
        (lambda c: c.replace('"vocab_size": 257', '"vocab_size": 258'), "(257,) entries for a vocabulary of 258"),
        (lambda c: c.replace('"<u2"', '"<u4"'), "tokens of uint32"),
    ],
)
def test_a_damaged_card(write: Write, tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    corpus, root = write(count=40, tokenizer="bytes"), tmp_path / "root"
    card = prepare(corpus, root).folder / "card.json"
    assert change(card.read_text()) != card.read_text()
    card.write_text(change(card.read_text()))
    assert message in fails(corpus, root, load)


def test_a_large_file_is_checked_at_both_ends(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "EDGE", 100)
    corpus, root = write(count=40, tokenizer="bytes"), tmp_path / "root"
    file = prepare(corpus, root).folder / "train.bin"
    for place in (0, 99, -100, -1):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        assert "corrupt" in fails(corpus, root, load)
        prepare(corpus, root)


def test_what_was_never_prepared_says_so(write: Write, tmp_path: Path) -> None:
    told = fails(write(), tmp_path / "root", load)
    assert told == f"corpus with source 'files' is not prepared in {str(tmp_path / 'root')!r}: run `ablate prepare`"


# --- the default corpus


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(Corpus(), tmp_path_factory.mktemp("stdlib"))


def test_the_default_corpus(stdlib: Prepared) -> None:
    assert stdlib.vocab_size == 2048
    assert stdlib.train.dtype == np.uint16
    card = stdlib.card
    assert sum(s["bytes"] for s in card["splits"].values()) > 6e6
    assert len(stdlib.validation) > 65536  # the evaluation slice of a default trial
    assert 0.2 < card["tokenizer"]["tokens_per_byte"] < 0.4
    assert card["licence"].startswith("PSF-2.0")
    assert not any(str(v).startswith("/") for v in card["source"].values())
    assert not stdlib.documents().filter(pl.col("name").str.starts_with("/")).collect().height


def test_the_default_tokenizer_trained_again_is_the_same(stdlib: Prepared, tmp_path: Path) -> None:
    texts = {d.name: d.text for d in corpora.documents(Corpus(), tmp_path)}
    names = stdlib.documents().filter(pl.col("split") == "train").collect()["name"]
    again = codecs.train(iter([[texts[name] for name in names]]), 2048)
    assert codecs.content_hash(again) == stdlib.tokenizer_hash
