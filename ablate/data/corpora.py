"""Sources of text (the standard library, local files, the Hub), each a stream of named documents in a fixed order."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import platform
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ablate.config import ConfigError, Corpus, digest

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
LONG_FILE = 256 * 1024
"""Bytes above which a .txt or .md file is cut at blank lines; below, one file is one document."""
PASSAGE = 4 * 1024
"""Least characters of a document cut from a long file."""
LONGEST_LINE = 1024 * 1024
"""Characters after which a line is cut, so that a file of one endless line fits in memory."""

_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
# Written at this Python's build or by its distributor; they hold paths of the machine.
_SITE_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
# Charmap codecs, pydoc topics and other tables say in their first two lines that a tool wrote them.
_GENERATED = re.compile(rb"auto-?generated|generated (from|by)", re.IGNORECASE)
_WIKITEXT_TITLE = re.compile(r" = [^=].* = \n?")


@dataclass(frozen=True)
class Document:
    """One text with a name that says where it is in its source (never a machine's absolute path)."""

    name: str
    text: str


@dataclass(frozen=True)
class HubPreset:
    """A well-known data set on the Hub."""

    name: str
    licence: str
    configuration: str | None = None
    articles: bool = False
    """Rows are lines, and a title line starts an article: lines are joined to articles, which are the documents."""


_WIKIPEDIA = "CC BY-SA 3.0 and GFDL (text of Wikipedia)"
HUB_PRESETS = {
    "wikitext-2": HubPreset("Salesforce/wikitext", _WIKIPEDIA, "wikitext-2-raw-v1", articles=True),
    "wikitext-103": HubPreset("Salesforce/wikitext", _WIKIPEDIA, "wikitext-103-raw-v1", articles=True),
    "tinystories": HubPreset("roneneldan/TinyStories", "CDLA-Sharing-1.0 (stories written by GPT-3.5 and GPT-4)"),
    "openwebtext": HubPreset(
        "Skylion007/openwebtext", "CC0-1.0 for the collection; the texts belong to their authors on the web"
    ),
    "fineweb-edu": HubPreset(
        "HuggingFaceFW/fineweb-edu", "ODC-By 1.0; use is subject to Common Crawl's terms", "sample-10BT"
    ),
}


def documents(corpus: Corpus, cache: Path) -> Iterator[Document]:
    """All documents of a source in a fixed order, duplicates and empty ones included, read as a stream.

    `cache` is the folder for what `datasets` keeps (files of the Hub; locks). Raises ConfigError for what is missing,
    binary, not decodable, without the text field, or unreachable.
    """
    with private_datasets(cache):
        if corpus.source == "stdlib":
            yield from _rows(_text_documents, stdlib_files())
        elif corpus.source == "files":
            yield from _file_documents(corpus)
        else:
            yield from _hub_documents(corpus, cache)


def licence(corpus: Corpus) -> str:
    """One line on the terms of a source, for the data card."""
    if corpus.source == "stdlib":
        return "PSF-2.0 (the Python standard library; see LICENSE.txt of the Python that runs)"
    if corpus.source == "files":
        return "unknown: the user's own files"
    if corpus.preset is not None and corpus.name is None:
        return HUB_PRESETS[corpus.preset].licence
    return f"see the card of {corpus.name} on the Hub"


def identity(corpus: Corpus, root: Path) -> dict[str, str]:
    """What tells one state of a source from another, beside its settings: Python's version, the files' content.

    Raises ConfigError where files are missing. Reading gigabytes at each start of a worker would cost minutes, so the
    content's hash is kept under `root`, by the names, sizes and times of the files.
    """
    if corpus.source == "stdlib":
        return {"python": f"{platform.python_implementation()} {platform.python_version()}"}
    if corpus.source == "hub":
        return {}
    files = find_files(corpus)
    stats = [path.stat() for _, path in files]
    seen = digest([[str(path), s.st_size, s.st_mtime_ns] for (_, path), s in zip(files, stats, strict=True)])
    note = root / ".cache" / f"{seen}.sha256"
    if note.is_file() and len(content := note.read_text(encoding="ascii")) == 64:
        return {"content": content}
    total = hashlib.sha256()
    for name, path in files:
        with _readable(path), path.open("rb") as file:
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    # A file may change again within one tick of its clock, unseen: only a state that has settled is noted.
    if all(time.time_ns() - s.st_mtime_ns > 2_000_000_000 for s in stats):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(total.hexdigest(), encoding="ascii")
    return {"content": total.hexdigest()}


# --- the standard library


def stdlib_files() -> list[tuple[str, Path]]:
    """Python's own library sources, sorted: (name relative to the library, path).

    Left out: tests, installed packages, tables that a tool generated, and the build's settings, which hold paths.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _STDLIB_LEFT_OUT and not f.startswith("config-")]
        for path in (Path(folder, f) for f in files if f.endswith(".py") and not f.startswith(_SITE_FILES)):
            with path.open("rb") as file:
                generated = _GENERATED.search(file.readline(500) + file.readline(500))
            if not generated:
                found.append((path.relative_to(root).as_posix(), path))
    if not found:
        raise ConfigError(
            f"corpus.source is 'stdlib': this Python has no sources in {str(root)!r}; use source 'files' or 'hub'"
        )
    return sorted(found)


# --- local files


def find_files(corpus: Corpus) -> list[tuple[str, Path]]:
    """The files of a 'files' corpus, sorted by name: (name relative to the folder, path). Raises ConfigError."""
    assert corpus.path is not None
    given = Path(corpus.path).expanduser()
    if given.is_dir():
        base, candidates = given, list(given.rglob("*"))
        # Hidden folders hold tools' files (.git, .venv), not a corpus.
        candidates = [p for p in candidates if not any(part.startswith(".") for part in p.relative_to(base).parts)]
    elif given.is_file():
        base, candidates = given.parent, [given]
    elif glob.has_magic(str(given)):
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
        candidates = [Path(p) for p in glob.glob(str(given), recursive=True)]
        if not candidates:
            raise ConfigError(f"corpus.path is {corpus.path!r}: no file matches this pattern under {str(base)!r}")
    else:
        raise ConfigError(f"corpus.path is {corpus.path!r}: no such file or directory")
    found = sorted((p.relative_to(base).as_posix(), p) for p in candidates if p.is_file() and p.suffix in SUFFIXES)
    if not found:
        raise ConfigError(f"corpus.path is {corpus.path!r}: no file there ends in one of {', '.join(SUFFIXES)}")
    return found


def _file_documents(corpus: Corpus) -> Iterator[Document]:
    """Runs of neighbours of one kind are one data set, so that the order stays that of the names."""
    run: list[tuple[str, Path]] = []
    for name, path in [*find_files(corpus), ("", Path())]:
        if run and path.suffix != run[0][1].suffix:
            if run[0][1].suffix == ".jsonl":
                yield from _rows(_jsonl_documents, run, field=corpus.text_field)
            elif run[0][1].suffix == ".parquet":
                for parquet in run:
                    yield from _parquet_documents(*parquet, corpus.text_field)
            else:
                yield from _rows(_text_documents, run)
            run = []
        run.append((name, path))


def _text_documents(files: list[tuple[str, str]]) -> Iterator[dict[str, str]]:
    for name, file in files:
        path = Path(file)
        long = path.stat().st_size > LONG_FILE and path.suffix in {".txt", ".md"}
        with _readable(path), path.open(encoding="utf-8-sig", newline="") as lines:
            passages = _passages(lines) if long else iter([lines.read()])
            for i, text in enumerate(passages):
                if "\0" in text:
                    raise ConfigError(f"corpus: {file!r} is binary (it holds a NUL byte): text in UTF-8 is expected")
                yield {"name": f"{name}#{i}" if long else name, "text": text}


def _passages(lines: Any) -> Iterator[str]:
    """Cut a long text at blank lines, so that a corpus of one file can be split by document, and read in pieces."""
    held: list[str] = []
    size = 0
    while line := lines.readline(LONGEST_LINE):
        held.append(line)
        size += len(line)
        if size >= LONGEST_LINE or (size >= PASSAGE and not line.strip()):
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _jsonl_documents(files: list[tuple[str, str]], field: str) -> Iterator[dict[str, str]]:
    for name, file in files:
        path = Path(file)
        with _readable(path), path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"corpus: {file!r} line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
                if not isinstance(row, dict):
                    raise ConfigError(f"{where} is a {type(row).__name__}: an object with {field!r} is expected")
                yield {"name": f"{name}#{number}", "text": _text_of(row, field, where)}


def _parquet_documents(name: str, path: Path, field: str) -> Iterator[Document]:
    from datasets import load_dataset  # type: ignore[import-untyped]

    try:
        with path.open("rb") as file:  # a path would be taken for a pattern
            schema = pl.read_parquet_schema(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(f"corpus: {str(path)!r} is not a parquet file: {_first_line(error)}") from None
    if schema.get(field) != pl.String:
        has = "no such column" if field not in schema else f"{schema[field]} there"
        raise ConfigError(
            f"corpus.text_field is {field!r}: {has} in {str(path)!r}; columns of text: "
            f"{', '.join(c for c, t in schema.items() if t == pl.String) or 'none'}"
        )
    files = [glob.escape(str(path.resolve()))]
    try:
        rows = load_dataset("parquet", data_files=files, columns=[field], split="train", streaming=True)
        for number, row in enumerate(rows):
            yield Document(f"{name}#{number}", _text_of(row, field, f"corpus: {str(path)!r} row {number}"))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"corpus: {str(path)!r} cannot be read as parquet: {_first_line(error)}") from None


# --- the Hub


def hub_arguments(corpus: Corpus, cache: Path) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset`; a name or configuration that is given goes over the preset's."""
    preset = HUB_PRESETS[corpus.preset] if corpus.preset else None
    return {
        "path": corpus.name or (preset.name if preset else None),
        "name": corpus.configuration or (preset.configuration if preset and not corpus.name else None),
        "split": corpus.split,
        "streaming": corpus.streaming,
        "cache_dir": str(cache / "hub"),
    }


def _hub_documents(corpus: Corpus, cache: Path) -> Iterator[Document]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]

    arguments = hub_arguments(corpus, cache)
    what = f"corpus.name is {arguments['path']!r}"
    if arguments["name"]:
        what += f" (configuration {arguments['name']!r})"
    preset = HUB_PRESETS[corpus.preset] if corpus.preset and not corpus.name else None
    try:
        rows = load_dataset(**arguments)
        if rows.column_names and corpus.text_field in rows.column_names:
            rows = rows.select_columns([corpus.text_field])
        texts = (_text_of(row, corpus.text_field, what) for row in rows)
        for number, text in enumerate(_articles(texts) if preset and preset.articles else texts):
            yield Document(f"{corpus.split}#{number}", text)
    # `datasets` says RuntimeError where a data set still needs a loading script.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what}: it cannot be loaded: {_first_line(error)}") from None


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Join the lines of WikiText to articles: a line ' = Title = ' starts one, ' = = Section = = ' does not."""
    held: list[str] = []
    for line in lines:
        if held and _WIKITEXT_TITLE.fullmatch(line):
            yield "".join(held)
            held = []
        held.append(line)
    if held:
        yield "".join(held)


# --- shared


def _rows(generator: Any, files: list[tuple[str, Path]], **arguments: str) -> Iterator[Document]:
    """Read files through `datasets` as a stream."""
    from datasets import Features, IterableDataset, Value

    features = Features({"name": Value("string"), "text": Value("string")})
    given = {"files": [(name, str(path)) for name, path in files], **arguments}
    for row in IterableDataset.from_generator(generator, features=features, gen_kwargs=given):
        yield Document(row["name"], row["text"])


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise ConfigError(f"{where}: corpus.text_field is {field!r}: not among its fields {', '.join(row) or '(none)'}")
    text = row[field]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: corpus.text_field {field!r} holds {type(text).__name__}: text is expected")
    return text


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"corpus: {str(path)!r} is not text in UTF-8: byte 0x{byte:02x} in it") from None
    except OSError as error:
        raise ConfigError(f"corpus: {str(path)!r} cannot be read: {error.strerror}") from None


@contextmanager
def private_datasets(cache: Path) -> Iterator[None]:
    """`datasets` with its cache in a folder of ours, and without download counts (a request home at every load),
    progress bars and logged errors."""
    import datasets

    config, level, bars = datasets.config, datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    before = config.HF_UPDATE_DOWNLOAD_COUNTS, config.HF_DATASETS_CACHE
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    config.HF_UPDATE_DOWNLOAD_COUNTS, config.HF_DATASETS_CACHE = False, cache
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS, config.HF_DATASETS_CACHE = before
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
