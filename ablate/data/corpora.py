"""Sources of text (the standard library, local files, the Hub), each a stream of named documents in a fixed order."""

from __future__ import annotations

import hashlib
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

from ablate.config import ConfigError, Corpus, digest, reason
from ablate.data.local_files import find_files, read_rows, readable, text_of

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

    `cache` is the folder for what `datasets` keeps (files of the Hub). Raises ConfigError for what is missing,
    binary, not decodable, without the text field, or unreachable.
    """
    if corpus.source == "hub":
        with private_datasets(cache):
            yield from _hub_documents(corpus, cache)
        return
    # Read without `datasets`, which imports torch and takes seconds to start.
    files = stdlib_files() if corpus.source == "stdlib" else find_files(corpus)
    for row in read_rows([(name, str(path)) for name, path in files], corpus.text_field):
        yield Document(row["name"], row["text"])


def local_rows(files: list[tuple[str, Path]], field: str) -> Any:
    """Return documents of local files as a `datasets.IterableDataset` of name and text; each file is a shard."""
    from datasets import Features, IterableDataset, Value  # type: ignore[import-untyped]

    features = Features({"name": Value("string"), "text": Value("string")})
    given = {"files": [(name, str(path)) for name, path in files], "field": field}
    return IterableDataset.from_generator(read_rows, features=features, gen_kwargs=given)


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
        with readable(path), path.open("rb") as file:
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
        texts = (text_of(row, corpus.text_field, what) for row in rows)
        for number, text in enumerate(_articles(texts) if preset and preset.articles else texts):
            yield Document(f"{corpus.split}#{number}", text)
    # `datasets` says RuntimeError where a data set still needs a loading script.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what}: it cannot be loaded: {reason(error)}") from None


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
