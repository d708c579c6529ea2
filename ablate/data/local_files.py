"""Local files as documents: which files a corpus has, and the one reader of them, for `prepare` and for streams."""

from __future__ import annotations

import glob
import gzip
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ablate.config import ConfigError, Corpus, echo, reason
from ablate.config.text import is_text, load_json

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
PACKED = ".gz"
"""May follow each suffix but .parquet, which packs its columns itself."""
LONG_FILE = 256 * 1024
"""Bytes above which a .txt or .md file is cut at blank lines; below, one file is one document."""
PASSAGE = 4 * 1024
"""Least characters of a document cut from a long file."""
LONGEST_LINE = 1024 * 1024
"""Characters after which a line is cut, so that a file of one endless line fits in memory."""
LONGEST_ROW = 256 * 1024 * 1024
"""Characters of a line of JSON, which cannot be cut."""
ROWS_AT_ONCE = 256

Named = tuple[str, str]
"""A file's name in its corpus, and its path."""


def find_files(corpus: Corpus) -> list[tuple[str, Path]]:
    """Return the files of a 'files' corpus, sorted by name: (name relative to the folder, path). Raises ConfigError."""
    assert corpus.path is not None
    given = expanded(corpus.path)
    try:
        base, candidates = _candidates(given, corpus.path)
        found = sorted((_name(p.relative_to(base)), p) for p in candidates if p.is_file() and kind_of(p))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"corpus.path is {corpus.path!r}: it cannot be read: {reason(error)}") from None
    if not found:
        raise ConfigError(f"corpus.path is {corpus.path!r}: no file there ends in one of {', '.join(SUFFIXES)}")
    return found


def expanded(path: str) -> Path:
    """Return a path with `~` as the user's home; one that names no user stays as it is."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises RuntimeError there


def kind_of(path: Path) -> str | None:
    """Return which of SUFFIXES a file has, in small letters and without `.gz`; None for any other."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(PACKED)).suffix
    if suffix not in SUFFIXES or (suffix == ".parquet" and name.endswith(PACKED)):
        return None
    return suffix


def read_rows(files: list[Named], field: str) -> Iterator[dict[str, str]]:
    """Yield every document of some files as {"name", "text"}, in order; a document without text has the text ''.

    `field` names what holds the text in .jsonl and .parquet.

    Raises:
        ConfigError: a file is damaged, binary, not UTF-8, or without that field; with its line or row.
    """
    for name, file in files:
        path = Path(file)
        kind = kind_of(path)
        if kind == ".parquet":
            yield from _parquet_rows(name, path, field)
        elif kind == ".jsonl":
            yield from _json_rows(name, path, field)
        else:
            yield from _texts(name, path)


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """Return the text of a row, '' where it is null; raises ConfigError where there is none, or half a character."""
    if field not in row:
        raise ConfigError(f"{where}: corpus.text_field is {field!r}: not among its fields {listed(row)}")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ConfigError(f"{where}: corpus.text_field {field!r} holds {type(text).__name__}: text is expected")
    if not is_text(text):
        half = next(c for c in text if not is_text(c))
        raise ConfigError(f"{where}: corpus.text_field {field!r} is not text: a lone surrogate U+{ord(half):04X} in it")
    return text


def listed(names: Iterable[str]) -> str:
    """Return names that a data file chose as an error shows them: the first few, escaped."""
    first = [echo(name)[1:-1] for name in itertools.islice(names, 20)]
    return ", ".join(first) or "(none)"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a text file is read into one line with the file and the line."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], _undecodable_line(path)
        raise ConfigError(f"corpus: {str(path)!r} is not text in UTF-8: byte 0x{byte:02x} in line {line}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"corpus: {str(path)!r} cannot be read: {reason(error)}") from None


def _candidates(given: Path, path: str) -> tuple[Path, list[Path]]:
    """Return the folder that names are relative to, and everything in it that may be a file of the corpus."""
    if given.is_dir():
        # Hidden folders hold tools' files (.git, .venv), not a corpus.
        found = [p for p in given.rglob("*") if not any(part.startswith(".") for part in p.relative_to(given).parts)]
        return given, found
    if given.is_file():
        return given.parent, [given]
    if not glob.has_magic(str(given)):
        raise ConfigError(f"corpus.path is {path!r}: no such file or directory")
    base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
    found = [Path(p) for p in glob.glob(str(given), recursive=True)]
    if not found:
        raise ConfigError(f"corpus.path is {path!r}: no file matches this pattern under {str(base)!r}")
    return base, found


def _name(relative: Path) -> str:
    r"""Return a file's name as text: bytes that are not UTF-8 are written as \xe9."""
    return os.fsencode(relative.as_posix()).decode("utf-8", "backslashreplace")


def _packed(path: Path) -> bool:
    return path.name.lower().endswith(PACKED)


def _open(path: Path, newline: str | None = None) -> IO[str]:
    if _packed(path):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _is_long(path: Path) -> bool:
    """Return whether a file holds more than LONG_FILE bytes of text."""
    if not _packed(path):
        return path.stat().st_size > LONG_FILE
    with gzip.open(path) as file:
        return len(file.read(LONG_FILE + 1)) > LONG_FILE


def _texts(name: str, path: Path) -> Iterator[dict[str, str]]:
    """Yield a text file as one document, or as passages where it is long and no program."""
    with readable(path), _open(path, newline="") as lines:
        long = kind_of(path) != ".py" and _is_long(path)
        for i, text in enumerate(_passages(lines) if long else [lines.read()]):
            if "\0" in text:
                raise ConfigError(f"corpus: {str(path)!r} is binary (it holds a NUL byte): text in UTF-8 is expected")
            yield {"name": f"{name}#{i}" if long else name, "text": text}


def _passages(lines: IO[str]) -> Iterator[str]:
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


def _json_rows(name: str, path: Path, field: str) -> Iterator[dict[str, str]]:
    with readable(path), _open(path) as lines:
        for number in itertools.count(1):
            line = lines.readline(LONGEST_ROW)
            if not line:
                return
            where = f"corpus: {str(path)!r} line {number}"
            if len(line) == LONGEST_ROW:
                raise ConfigError(f"{where} has over {LONGEST_ROW:,} characters")
            if not line.strip():
                continue
            row = load_json(line.rstrip("\n"), where)
            if not isinstance(row, dict):
                raise ConfigError(f"{where} is a {type(row).__name__}: an object with {field!r} is expected")
            yield {"name": f"{name}#{number}", "text": text_of(row, field, where)}


def _parquet_rows(name: str, path: Path, field: str) -> Iterator[dict[str, str]]:
    where = f"corpus: {str(path)!r}"
    with _arrow_errors(f"{where} is not a parquet file"):
        stored = path.open("rb")  # Arrow does not take every path
    with stored:
        with _arrow_errors(f"{where} is not a parquet file"):
            file = pq.ParquetFile(stored)
        if not file.metadata.num_rows:
            return
        with _arrow_errors(f"{where} cannot be read as parquet"):
            _check_column(file.schema_arrow, field, path)
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[field]):
                for value in batch.column(batch.schema.get_field_index(field)):
                    yield {"name": f"{name}#{number}", "text": _cell(value, field, f"{where} row {number}")}
                    number += 1


@contextmanager
def _arrow_errors(what: str) -> Iterator[None]:
    """Turn Arrow's errors on a damaged file into one line."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise ConfigError(f"{what}: {reason(error)}") from None


def _check_column(schema: pa.Schema, field: str, path: Path) -> None:
    kinds = dict(zip(schema.names, schema.types, strict=True))
    if schema.names.count(field) == 1 and _holds_text(kinds[field]):
        return
    has = "no such column" if field not in kinds else f"{echo(str(kinds[field]))[1:-1]} there"
    if schema.names.count(field) > 1:
        has = f"{schema.names.count(field)} columns of that name"
    texts = listed(c for c, t in kinds.items() if _holds_text(t))
    raise ConfigError(f"corpus.text_field is {field!r}: {has} in {str(path)!r}; columns of text: {texts}")


def _holds_text(kind: pa.DataType) -> bool:
    """Return whether a column holds text, also as categories, or only nulls, whose type a writer cannot know."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    )


def _cell(value: pa.Scalar, field: str, where: str) -> str:
    try:
        return text_of({field: value.as_py()}, field, where)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not text in UTF-8: byte 0x{error.object[error.start]:02x} in it") from None


def _undecodable_line(path: Path) -> int:
    """Return the number of the first line that is not UTF-8."""
    number = 0
    with gzip.open(path) if _packed(path) else path.open("rb") as file:
        for line in iter(lambda: file.readline(LONGEST_ROW), b""):
            number += 1
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                break
    return number
