"""Data files as others write them: read alike by `prepare` and by streams, or refused in one line with file and place."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ablate.config import ConfigError, Corpus
from ablate.data import codec, corpora, tokens
from ablate.data.local_files import find_files, read_rows
from ablate.data.stream import TokenStream

NATIVE = {"source": "files", "tokenizer": "bytes", "validation_share": 0.2, "test_share": 0.1}


def read(path: Path, **changes: Any) -> list[str]:
    return [d.text for d in corpora.documents(Corpus(path=str(path), **{**NATIVE, **changes}), path.parent / ".cache")]


def refused(path: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read(path, **changes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


def streamed(path: Path, windows: int = 400, **changes: Any) -> set[str]:
    """The whole documents in the first windows of a stream."""
    corpus = Corpus(path=str(path), **{**NATIVE, **changes})
    stream = TokenStream(corpus, codec.ByteCodec(), path.parent / ".cache", context=16, seed=0, shuffle=1)
    found: list[int] = []
    for window, position in itertools.islice(stream.windows(stream.start()), windows):
        found += window[:-1].tolist()
        if position.epoch > 1:
            break
    return {bytes(part).decode() for part in _split(found)[:-1]}


def _split(ids: list[int]) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for i in ids:
        if i == codec.ByteCodec.end_id:
            groups.append([])
        else:
            groups[-1].append(i)
    return groups


def prepared(path: Path, root: Path, **changes: Any) -> tokens.Prepared:
    return tokens.prepare(Corpus(path=str(path), **{**NATIVE, **changes}), root)


TEXTS = [f"document {i} of {random.Random(i).random()}" for i in range(40)]


# --- parquet as other writers leave it


def columns() -> dict[str, pa.Array]:
    half = pa.array([*TEXTS[:20], None, "", *TEXTS[20:]])
    return {
        "string": half,
        "large_string": half.cast(pa.large_string()),
        "string_view": half.cast(pa.string_view()),
        "dictionary": half.dictionary_encode(),
        "large_dictionary": half.cast(pa.large_string()).dictionary_encode(),
    }


@pytest.mark.parametrize("kind", list(columns()))
def test_columns_of_text_are_read_in_every_encoding(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": pa.array(range(42)), "text": columns()[kind]}), file, row_group_size=7)
    assert read(file) == [*TEXTS[:20], "", "", *TEXTS[20:]]
    assert prepared(file, tmp_path / "root").card["empty_dropped"] == 2
    assert streamed(file) <= set(TEXTS)


def test_shards_without_rows_or_with_nulls_only_give_no_documents(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS}), folder / "b.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    pq.write_table(pa.table({}), folder / "c.parquet")
    pq.write_table(pa.table({"text": pa.nulls(3)}), folder / "d.parquet")
    assert [t for t in read(folder) if t] == TEXTS
    corpus = prepared(folder, tmp_path / "root")
    assert sum(s["documents"] for s in corpus.card["splits"].values()) == len(TEXTS)
    assert streamed(folder) <= set(TEXTS)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": pa.array([[1]])}, "list<element: int64> there"),
        ({"text": pa.array([{"a": "b"}])}, "struct<a: string> there"),
        ({"text": pa.array([["a"]])}, "columns of text: (none)"),
        ({"text": pa.array([b"\xff"])}, "binary there"),
        ({"text": pa.array([1.5]), "body\n\x1b": pa.array(["x"])}, "columns of text: body\\n\\x1b"),
        ({"text.a": pa.array(["x"])}, "'text': no such column"),
    ],
)
def test_columns_that_are_no_text_are_named(table: dict[str, pa.Array], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert message in refused(tmp_path / "a.parquet")


def test_a_column_with_a_dot_in_its_name_is_that_column(tmp_path: Path) -> None:
    nested = pa.array([{"b": "inner"}] * 2)
    pq.write_table(pa.table({"a": nested, "a.b": ["x", "y"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="a.b") == ["x", "y"]


def test_bytes_in_a_text_column_that_are_not_utf8_name_their_row(tmp_path: Path) -> None:
    bad = pa.array([b"a", b"b", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    assert "row 2 is not text in UTF-8: byte 0xe9" in refused(tmp_path / "a.parquet")


# --- JSON lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "\\ud83d"}', "line 2: corpus.text_field 'text' is not text: a lone surrogate U+D83D"),
        ("[" * 100_000, "line 2 is not JSON: it is nested too deep"),
        ('{"text": ' + "9" * 5000 + "}", "line 2 is not JSON: Exceeds the limit"),
        ('{"text": ' + "9" * 50 + "}", "line 2: corpus.text_field 'text' holds int"),
        ('{"text": ["a"]}', "holds list: text is expected"),
        ('{"a\\u001b[31m\\n": 1}', "not among its fields a\\x1b[31m\\n"),
        ("null", "line 2 is a NoneType"),
        ('{"text": "a"} {"text": "b"}', "line 2 is not JSON: Extra data at column 15"),
        ("\ufeff" + '{"text": "a"}', "line 2 is not JSON"),
        ("{'text': 'a'}", "line 2 is not JSON"),
    ],
    ids=lambda text: ascii(text[:16]),
)
def test_a_line_that_is_no_document_is_named_by_prepare_and_stream(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "{TEXTS[0]}"}}\n{line}\n', encoding="utf-8")
    told = refused(file)
    assert message in told
    assert told.startswith(f"corpus: {str(file)!r} ")
    with pytest.raises(ConfigError) as error:
        streamed(file)
    assert str(error.value) == told


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["text", "n"]), JSON, max_size=2), max_size=4), ascii=st.booleans()
)
def test_any_json_gives_its_texts_or_one_line(rows: list[dict[str, Any]], ascii: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes("".join(json.dumps(r, ensure_ascii=ascii) + "\n" for r in rows).encode(errors="surrogatepass"))
    try:
        found = [row["text"] for row in read_rows([("a", str(file))], "text")]
    except ConfigError as error:
        told = str(error)
        assert told.isprintable(), ascii
        return
    assert found == [json.loads(json.dumps(r["text"])) or "" for r in rows]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".txt", ".parquet", ".txt.gz", ".JSONL.GZ"]))
def test_any_bytes_are_documents_or_one_line(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    try:
        for row in read_rows([("a", str(file))], "text"):
            row["text"].encode()
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017
    file.unlink()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_parquet_is_documents_or_one_line(place: int, value: int, cut: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [*TEXTS, None]}), file, row_group_size=10)
    content = bytearray(file.read_bytes())
    place %= len(content)
    content[place] = value
    file.write_bytes(content[:place] if cut else content)
    try:
        list(read_rows([("a", str(file))], "text"))
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017


# --- text files, their names and packings


def test_suffixes_count_in_any_case_and_packed_by_gzip(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_bytes("﻿grüße\r\n".encode())
    (tmp_path / "b.JsonL").write_text('{"text": "lines"}\r\n\r\n{"text": null}\r\n')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed lines"}\n', mtime=0))
    (tmp_path / "d.Txt.GZ").write_bytes(gzip.compress(b"packed text", mtime=0))
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "e.PARQUET")
    (tmp_path / "f.parquet.gz").write_bytes(b"left out")
    (tmp_path / "g.gz").write_bytes(b"left out")
    (tmp_path / "h.jsonl").write_text("")
    assert read(tmp_path) == ["grüße\r\n", "lines", "", "packed lines", "packed text", "row"]


def test_a_long_packed_text_is_cut_like_an_unpacked_one(tmp_path: Path) -> None:
    content = "".join(f"paragraph {i}\n\n" for i in range(40_000)).encode()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "p.txt").write_bytes(content)
    (tmp_path / "a" / "p.txt.gz").write_bytes(gzip.compress(content, mtime=0))
    found = read(tmp_path / "a")
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert len(found) > 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\nca\xe9\n", "not text in UTF-8: byte 0xe9 in line 3"),
        ("a.txt", "text".encode("utf-16"), "not text in UTF-8: byte 0xff in line 1"),
        ("a.txt", "text".encode("utf-16-le"), "is binary (it holds a NUL byte)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xc3"}\n', "byte 0xc3 in line 2"),
        ("a.jsonl.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot be read: Compressed file ended"),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}\n", mtime=0),
            "line 1: corpus.text_field is 'text': not among its fields (none)",
        ),
        ("a.txt.gz", gzip.compress(b"x\n\xff", mtime=0), "byte 0xff in line 2"),
        ("a.parquet", b"", "is not a parquet file"),
        ("a.parquet", b"PAR1" + bytes(20) + b"PAR1", "is not a parquet file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is not a parquet file"),
    ],
)
def test_content_that_is_no_text_names_file_and_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    told = refused(tmp_path / name)
    assert message in told
    assert str(tmp_path / name) in told


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
@pytest.mark.parametrize("suffix", [b".txt", b".jsonl", b".parquet", b".jsonl.gz"])
def test_a_file_whose_name_is_not_utf8_is_read_under_an_escaped_name(suffix: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    strange = os.path.join(os.fsencode(folder), b"caf\xe9 \n[x]*%20" + suffix)
    line = b'{"text": "strange"}\n'
    if suffix == b".parquet":
        with open(strange, "wb") as file:
            pq.write_table(pa.table({"text": ["strange"]}), file)
    else:
        content = {b".txt": b"strange", b".jsonl": line, b".jsonl.gz": gzip.compress(line, mtime=0)}[suffix]
        with open(strange, "wb") as file:
            file.write(content)
    found = prepared(folder, tmp_path / "root")
    names = found.documents().collect()["name"].to_list()
    assert next(name for name in names if name.startswith("caf")).startswith("caf\\xe9 \n[x]*%20")
    assert len(names) == len(TEXTS) + 1
    assert prepared(folder, tmp_path / "root").folder == found.folder


@pytest.mark.parametrize("name", ["a%20b", "[x]", "what?", "a b", "..x", "~", "#1", "a:b", "-x", "{a}", "$HOME"])
def test_a_folder_of_any_name_is_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    (folder / "b.jsonl").write_text('{"text": "line"}\n')
    pq.write_table(pa.table({"text": ["row"]}), folder / "c.parquet")
    assert read(folder) == ["text", "line", "row"]


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/dev/zero", "/proc/self/mem", "~nobody-here/x", "[", "**"])
def test_a_path_that_is_no_corpus_is_one_line(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^corpus.path is "):
        list(corpora.documents(Corpus(path=path, **NATIVE), tmp_path))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20) | st.none(), min_size=1, max_size=30))
def test_prepare_and_stream_see_the_same_documents(texts: list[str | None], tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir(exist_ok=True)
    rows = [{"text": t} for t in texts]
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / "b.parquet")
    once = [t or "" for t in texts]
    assert read(folder) == [*once, *once]
    corpus = Corpus(path=str(folder), **NATIVE)
    rows_of_stream = list(corpora.local_rows(find_files(corpus), "text"))
    assert [row["text"] for row in rows_of_stream] == [*once, *once]


# --- tokenizers


@pytest.mark.parametrize(
    "text",
    ["A" * 300_000, " " * 300_000, "ACGT" * 75_000, "-" * 300_000, "字" * 100_000, "½5" * 100_000, "\x1c!" * 100_000],
    ids=lambda t: ascii(t[:4]),
)
def test_training_on_a_text_without_blanks_takes_seconds_and_loses_nothing(text: str) -> None:
    began = time.process_time()
    trained = codec.train(iter([[text, *TEXTS]]), 600)
    [ids] = trained.encode_batch([text])
    assert time.process_time() - began < 20
    assert trained.decode(ids) == text
    assert trained.vocab_size > 300


def test_words_up_to_the_limit_train_the_tokenizer_they_always_did() -> None:
    texts = [*TEXTS, "A" * codec.LONGEST_WORD, "the tree " * 200]
    from tokenizers import decoders, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[codec.END],
        initial_alphabet=codec.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator([texts], trainer)
    assert json.loads(codec.train(iter([texts]), 400).content())["model"] == json.loads(plain.to_str())["model"]


def tokenizer_file(path: Path, **model: Any) -> Path:
    data = json.loads(codec.train(iter([TEXTS]), 400).content())
    data["model"].update(model)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1.0])
def test_a_tokenizer_with_dropout_gives_one_text_the_same_tokens(dropout: float, tmp_path: Path) -> None:
    plain = codec.from_file(tokenizer_file(tmp_path / "a.json"))
    random_one = codec.from_file(tokenizer_file(tmp_path / "b.json", dropout=dropout))
    for text in TEXTS[:5]:
        again = [random_one.encode_batch([text])[0] for _ in range(5)]
        assert all(np.array_equal(ids, plain.encode_batch([text])[0]) for ids in again)
    assert codec.content_hash(random_one) == codec.content_hash(plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not JSON: it is nested too deep"),
        (b'{"model": {"vocab": {"a": ' + b"9" * 5000 + b"}}}", "is not JSON: Exceeds the limit"),
        (b"", "is not JSON"),
        (b"\xff\xfe{\0}\0", "is not text in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is not JSON"),
        (b"[]", "is not a tokenizer of the `tokenizers` library"),
        (b'{"model": {"vocab": [], "merges": 1, "type": "BPE"}}', "is not a tokenizer"),
    ],
    ids=lambda c: ascii(c[:12]),
)
def test_a_tokenizer_file_that_is_none_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        codec.from_file(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "a\0b", "/nowhere/t.json"])
def test_a_tokenizer_that_is_no_file_is_refused_at_once(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        codec.from_file(Path(path))
