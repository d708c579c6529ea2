"""Sources: what is read, in which order, and what bad input says."""

from __future__ import annotations

import json
import os
import socket
import sysconfig
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ablate.config import ConfigError, Corpus
from ablate.data import corpora, local_files
from ablate.data.corpora import Document


def read(cache: Path, **settings: Any) -> list[Document]:
    return list(corpora.documents(Corpus(**settings), cache))


def fails(cache: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(cache, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the standard library


def test_stdlib_is_python_source_without_tests_tables_and_machine_paths() -> None:
    files = corpora.stdlib_files()
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert len(names) == len(set(names)) > 300
    assert {"typing.py", "asyncio/events.py", "encodings/utf_8.py", "idlelib/editor.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not {"encodings/cp1252.py", "pydoc_data/topics.py", "stringprep.py", "sitecustomize.py"} & set(names)
    assert not [name for name in names if "_sysconfigdata" in name or name.startswith("/")]
    size = sum(path.stat().st_size for _, path in files)
    assert 6e6 < size < 16e6


def test_stdlib_documents_are_the_files_themselves(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert [d.name for d in found] == [name for name, _ in corpora.stdlib_files()]
    argparse = next(d for d in found if d.name == "argparse.py")
    assert argparse.text.encode() == (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()


def test_stdlib_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "no sources" in fails(tmp_path, source="stdlib")


def test_reading_opens_no_connection_and_writes_nothing_outside_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    pl.DataFrame({"text": ["one", "two"]}).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("three")
    found = read(tmp_path / "cache", source="files", path=str(tmp_path / "*.*"))
    assert [d.text for d in found] == ["one", "two", "three"]
    assert list(home.iterdir()) == []


# --- files


def test_folder_mixes_kinds_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "a.txt").write_bytes("grüße\r\nzwei\n".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "eins", "n": 1}\n\n{"text": "zwei \\u00e9", "n": {"x": []}}\n')
    pl.DataFrame({"n": [1, 2], "text": ["p0", "p1"]}).write_parquet(tmp_path / "c.parquet")
    (tmp_path / "d" / "e.py").write_text("x = 1\n")
    (tmp_path / "f.md").write_text("\ufeff# Title\n", encoding="utf-8")
    (tmp_path / "g.csv").write_text("not read\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "h.txt").write_text("not read\n")
    assert read(tmp_path / "cache", source="files", path=str(tmp_path)) == [
        Document("a.txt", "grüße\r\nzwei\n"),
        Document("b.jsonl#1", "eins"),
        Document("b.jsonl#3", "zwei é"),
        Document("c.parquet#0", "p0"),
        Document("c.parquet#1", "p1"),
        Document("d/e.py", "x = 1\n"),
        Document("f.md", "# Title\n"),
    ]


def test_glob_single_file_and_names_with_glob_characters(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("a")
    (tmp_path / "x" / "b.md").write_text("b")
    pl.DataFrame({"body": ["weird"]}).write_parquet(tmp_path / "x" / "w[1]*.parquet")
    cache = tmp_path / "cache"
    assert read(cache, source="files", path=str(tmp_path / "**" / "*.txt")) == [Document("x/a.txt", "a")]
    assert read(cache, source="files", path=str(tmp_path / "x" / "b.md")) == [Document("b.md", "b")]
    weird = read(cache, source="files", path=str(tmp_path / "x" / "w[1]*.parquet"), text_field="body")
    assert weird == [Document("w[1]*.parquet#0", "weird")]


def test_a_relative_glob_is_read_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    assert read(tmp_path / "cache", source="files", path="*.txt") == [Document("a.txt", "a")]


def test_one_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i}\n" + "words and words\n" * (i % 9) + "\n" for i in range(5000))
    (tmp_path / "play.txt").write_text(text)
    found = read(tmp_path / "cache", source="files", path=str(tmp_path / "play.txt"))
    assert "".join(d.text for d in found) == text
    assert [d.name for d in found] == [f"play.txt#{i}" for i in range(len(found))]
    assert len(found) > 50
    assert all(len(d.text) >= local_files.PASSAGE and d.text.endswith("\n\n") for d in found[:-1])


def test_one_endless_line_is_cut_by_length(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("ab" * local_files.LONGEST_LINE)
    found = read(tmp_path / "cache", source="files", path=str(tmp_path / "line.txt"))
    assert [len(d.text) for d in found] == [local_files.LONGEST_LINE] * 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such file or directory"),
        ("*.txt", "no file matches this pattern"),
        ("only", "no file there ends in one of .txt, .md, .py, .jsonl, .parquet"),
    ],
)
def test_missing_files(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.csv").write_text("x")
    told = fails(tmp_path, source="files", path=str(tmp_path / path))
    assert told.startswith(f"corpus.path is {str(tmp_path / path)!r}: ")
    assert message in told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00text", "is not text in UTF-8: byte 0xff"),
        ("a.py", b"x = '\xe9'", "is not text in UTF-8: byte 0xe9"),
        ("a.txt", b"ELF\0\0\1", "is binary (it holds a NUL byte)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is a list: an object with 'text' is expected"),
        ("a.jsonl", b'{"body": "a", "n": 1}\n', "corpus.text_field is 'text': not among its fields body, n"),
        ("a.jsonl", b'{"text": 1}\n', "holds int: text is expected"),
        ("a.jsonl", b"\xff\n", "is not text in UTF-8: byte 0xff in line 1"),
        ("a.parquet", b"not a parquet file", "is not a parquet file"),
    ],
)
def test_unreadable_content_names_the_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    told = fails(tmp_path / "cache", source="files", path=str(tmp_path))
    assert message in told
    assert str(tmp_path / name) in told


def test_parquet_column_must_exist_and_be_text(tmp_path: Path) -> None:
    pl.DataFrame({"text": [1], "body": ["a"]}).write_parquet(tmp_path / "a.parquet")
    path = str(tmp_path)
    assert "int64 there" in fails(tmp_path / "cache", source="files", path=path)
    told = fails(tmp_path / "cache", source="files", path=path, text_field="txt")
    assert "'txt': no such column" in told
    assert "columns of text: body" in told


def test_parquet_damaged_past_its_footer(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pl.DataFrame({"text": [f"row {i} " * 50 for i in range(500)]}).write_parquet(file)
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)
    file.write_bytes(content)
    assert "cannot be read as parquet" in fails(tmp_path / "cache", source="files", path=str(file))


# --- the Hub (a local folder stands for a data set: the same call reads both)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"preset": "wikitext-2"}, ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False)),
        ({"preset": "wikitext-103", "split": "test"}, ("Salesforce/wikitext", "wikitext-103-raw-v1", "test", False)),
        ({"preset": "tinystories"}, ("roneneldan/TinyStories", None, "train", False)),
        ({"preset": "openwebtext", "streaming": True}, ("Skylion007/openwebtext", None, "train", True)),
        ({"preset": "fineweb-edu"}, ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", False)),
        (
            {"preset": "fineweb-edu", "configuration": "sample-100BT"},
            ("HuggingFaceFW/fineweb-edu", "sample-100BT", "train", False),
        ),
        ({"name": "me/mine", "configuration": "de"}, ("me/mine", "de", "train", False)),
        ({"name": "me/mine", "preset": "wikitext-2"}, ("me/mine", None, "train", False)),
    ],
)
def test_hub_arguments(tmp_path: Path, settings: dict[str, Any], expected: tuple[Any, ...]) -> None:
    given = corpora.hub_arguments(Corpus(source="hub", **settings), tmp_path)
    assert (given["path"], given["name"], given["split"], given["streaming"]) == expected
    assert given["cache_dir"] == str(tmp_path / "hub")


def test_every_preset_of_the_settings_exists_and_has_a_licence_note() -> None:
    for preset in corpora.HUB_PRESETS:
        assert len(corpora.licence(Corpus(source="hub", preset=preset))) > 5
    annotation = Corpus.model_json_schema()["properties"]["preset"]["anyOf"][0]["enum"]
    assert set(annotation) == set(corpora.HUB_PRESETS)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"text": f"document {i}", "n": i} for i in range(10)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text('{"text": "held out", "n": 0}\n')
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set_is_read_whole_or_streamed(tmp_path: Path, dataset: Path, streaming: bool) -> None:
    cache = tmp_path / "cache"
    found = read(cache, source="hub", name=str(dataset), streaming=streaming)
    assert found == [Document(f"train#{i}", f"document {i}") for i in range(10)]
    assert read(cache, source="hub", name=str(dataset), streaming=streaming, split="test")[0].text == "held out"
    assert bool(list(cache.rglob("*.arrow"))) is not streaming


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_errors(tmp_path: Path, dataset: Path, streaming: bool) -> None:
    cache = tmp_path / "cache"
    hub: dict[str, Any] = {"source": "hub", "name": str(dataset), "streaming": streaming}
    assert "'body': not among its fields" in fails(cache, **hub, text_field="body")
    assert "holds int: text is expected" in fails(cache, **hub, text_field="n")
    assert "cannot be loaded" in fails(cache, **hub, split="nosuch")
    assert "cannot be loaded" in fails(cache, **hub, configuration="nosuch")
    missing = fails(cache, **{**hub, "name": str(tmp_path / "nosuch")})
    assert missing.startswith(f"corpus.name is {str(tmp_path / 'nosuch')!r}: it cannot be loaded")


def test_wikitext_preset_joins_lines_to_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the data set's own name and layout stands for it: `datasets` looks there first."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Salesforce" / "wikitext"
    folder.mkdir(parents=True)
    lines = ["", " = One = \n", "", " text = 1 \n", " = = Part = = \n", " more \n", " = Two Three = \n", " end \n"]
    pl.DataFrame({"text": lines}).write_parquet(folder / "lines.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - split: train\n    path: lines.parquet\n---\n"
    )
    assert [d.text for d in read(tmp_path / "cache", source="hub", preset="wikitext-2")] == [
        "",
        " = One = \n text = 1 \n = = Part = = \n more \n",
        " = Two Three = \n end \n",
    ]


# --- identity of a source


def test_identity_of_files_follows_content_and_names_not_place(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("same")
    a, b = (Corpus(source="files", path=str(tmp_path / folder)) for folder in ("a", "b"))
    first = corpora.identity(a, root)
    assert first == corpora.identity(b, root) == corpora.identity(a, root)
    (tmp_path / "b" / "x.txt").write_text("SAME")
    assert corpora.identity(b, root) != first
    (tmp_path / "a" / "x.txt").rename(tmp_path / "a" / "y.txt")
    assert corpora.identity(a, root) != first


def test_identity_of_settled_files_is_read_once(tmp_path: Path) -> None:
    root, file = tmp_path / "root", tmp_path / "x.txt"
    corpus = Corpus(source="files", path=str(file))
    file.write_text("one")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    first = corpora.identity(corpus, root)
    assert len(list((root / ".cache").iterdir())) == 1
    file.write_text("two")  # same size, new time: read anew
    assert corpora.identity(corpus, root) != first
    os.utime(file, (1_000_000_000, 1_000_000_000))  # what the note answers to: name, size and time
    assert corpora.identity(corpus, root) == first
