"""A corpus made ready for training: unique documents, split by content, tokenized and packed into memory-mapped files.

A prepared corpus is a folder `root/<key>/`: train.bin, validation.bin, test.bin (little-endian ids, each document
followed by the end mark), token_bytes.npy, tokenizer.json, documents.parquet (id, split, name, bytes, tokens),
held_out.parquet (id, split, name, text of validation and test), and card.json, the data card, which also lists every
file's size and hash.
"""

# Longer than 400 lines because what is written to the folder is read and checked beside it.
from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from filelock import FileLock

from ablate.config import ConfigError, Corpus, digest
from ablate.data import codec as codecs
from ablate.data import corpora
from ablate.data.local_files import expanded

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Stream = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Progress = Callable[[str, int, int | None], None]
"""Called with a stage ('read', 'train tokenizer', 'encode'), bytes of text done, and bytes in all where known."""

FORMAT = 1
"""Raised when the same settings would give other files, so that old folders are not mistaken for new ones."""
PART_BYTES = 16 * 1024 * 1024
"""Text in memory at a time."""
BATCH_BYTES = 2 * 1024 * 1024
"""Text encoded at a time."""
EDGE = 32 * 1024 * 1024
"""Files over twice this size are checked by their size and this much of both ends."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus, opened; the arrays are read-only maps of files."""

    folder: Path
    vocab_size: int
    """Entries the model needs: the largest id + 1 (for a small text fewer than were asked for)."""
    end_id: int
    train: Stream
    validation: Stream
    test: Stream
    token_bytes: npt.NDArray[np.int32]
    """[vocab_size]; 0 for the end mark, so bpb = sum of nll (nats) / (ln 2 · sum of token_bytes[targets])."""
    data_hash: str
    """Over ids and splits of all documents, in order; with tokenizer_hash it fixes every token."""
    tokenizer_hash: str
    card: dict[str, Any]

    @property
    def hashed_card(self) -> dict[str, Any]:
        """The data card with the hashes of data and tokenizer."""
        return {**self.card, "data_hash": self.data_hash, "tokenizer_hash": self.tokenizer_hash}

    @cached_property
    def codec(self) -> codecs.Codec:
        """The saved tokenizer."""
        path = self.folder / "tokenizer.json"
        if self.card["tokenizer"]["kind"] == "bytes":
            return codecs.ByteCodec()
        return codecs.from_content(path.read_text(encoding="utf-8"), f"tokenizer {str(path)!r}")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end mark."""
        return [int(i) for i in self.codec.encode_batch([text])[0]]

    def decode(self, ids: Any) -> str:
        """Text behind ids (any sequence of integers); end marks vanish."""
        return self.codec.decode(int(i) for i in ids)

    def documents(self) -> pl.LazyFrame:
        """One row a document in the order of the streams: id, split, name, bytes, tokens (end mark not counted)."""
        return pl.scan_parquet(self.folder / "documents.parquet", glob=False)

    def held_out(self, split: Literal["validation", "test"]) -> pl.DataFrame:
        """id, name and text of the documents of a held-out split."""
        table = pl.scan_parquet(self.folder / "held_out.parquet", glob=False).filter(pl.col("split") == split)
        return table.select("id", "name", "text").collect()


def prepare(corpus: Corpus, root: Path, *, force: bool = False, progress: Progress | None = None) -> Prepared:
    """Make a corpus ready, or open it where that is done already; safe when several processes call it at once.

    A damaged folder is made again; `force` makes any folder again. Raises ConfigError for a source that is missing,
    empty or unreadable, and for a corpus too small to have training and validation documents.
    """
    root.mkdir(parents=True, exist_ok=True)
    key = corpus_key(corpus, root)
    with FileLock(root / f".{key}.lock"):
        if not force and (root / key).is_dir():
            try:
                return load(corpus, root)
            except ConfigError as error:
                _log.warning("%s; preparing it again", error)
        work, partial, old = (root / f".{key}.{what}" for what in ("work", "partial", "old"))
        for left in (work, partial, old):
            shutil.rmtree(left, ignore_errors=True)
        try:
            work.mkdir()
            partial.mkdir()
            _build(corpus, root, key, work, partial, progress or (lambda stage, done, total: None))
            if (root / key).exists():
                (root / key).rename(old)
            partial.rename(root / key)
        finally:
            for left in (work, partial, old):
                shutil.rmtree(left, ignore_errors=True)
        return load(corpus, root)


def load(corpus: Corpus, root: Path) -> Prepared:
    """Open a prepared corpus and check its files. Raises ConfigError naming the file and what is wrong with it."""
    folder = root / corpus_key(corpus, root)
    if not folder.is_dir():
        raise ConfigError(
            f"corpus with source {corpus.source!r} is not prepared in {str(root)!r}: run `ablate prepare`"
        )
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        files, splits, tokenizer = card["files"], card["splits"], card["tokenizer"]
        vocab_size, dtype = tokenizer["vocab_size"], np.dtype({"<u2": "<u2", "<u4": "<u4"}[tokenizer["dtype"]])
        if vocab_size > np.iinfo(dtype).max + 1:
            raise _damaged(path, f"a vocabulary of {vocab_size} is larger than its integer type {dtype.name}")
        for name, expected in files.items():
            _check(folder / name, expected)
        streams = {s: _map(folder / f"{s}.bin", dtype, splits[s]["stream"]) for s in SPLITS}
        token_bytes = np.load(folder / "token_bytes.npy")
        if token_bytes.shape != (vocab_size,):
            raise _damaged(folder / "token_bytes.npy", f"{token_bytes.shape} entries for a vocabulary of {vocab_size}")
        token_bytes.flags.writeable = False
        return Prepared(
            folder=folder,
            vocab_size=vocab_size,
            end_id=tokenizer["end_id"],
            token_bytes=token_bytes,
            data_hash=card["data_hash"],
            tokenizer_hash=tokenizer["hash"],
            card=card,
            **streams,
        )
    except FileNotFoundError:
        raise _damaged(path, "missing") from None
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        raise _damaged(path, "not a data card") from None


def corpus_key(corpus: Corpus, root: Path) -> str:
    """Name of a corpus's folder: the digest of its settings and of its source's state. Raises ConfigError.

    Files count by their names and content, so a folder that was moved is the same corpus.
    """
    unused = {"path", "tokenizer_file", "stream"} | ({"vocab_size"} if corpus.tokenizer != "bpe" else set())
    settings = corpus.model_dump(mode="json", exclude=unused)
    state: dict[str, Any] = {"format": FORMAT, "corpus": settings, **corpora.identity(corpus, root)}
    if corpus.tokenizer_file:
        state["tokenizer"] = codecs.content_hash(codecs.from_file(expanded(corpus.tokenizer_file)))
    return digest(state)


def describe(prepared: Prepared) -> dict[str, Any]:
    """What `ablate prepare --json` prints: the data card without its list of files, and where the corpus lies."""
    return {"folder": str(prepared.folder), **{k: v for k, v in prepared.card.items() if k != "files"}}


def split_of(content: bytes, corpus: Corpus) -> Split:
    """The split of a document, from the SHA-256 of its text alone: test from below, validation from above, so that
    a change of one share moves no document between the other two splits."""
    place = int.from_bytes(content[:8]) / 2**64
    if place < corpus.test_share:
        return "test"
    return "validation" if place >= 1 - corpus.validation_share else "train"


# --- preparation


@dataclass
class _Collected:
    """Unique documents on disk, in parts of bounded size: id, split, name, bytes, text."""

    parts: list[Path] = field(default_factory=list)
    documents: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    duplicates: int = 0
    empty: int = 0
    data_hash: str = ""


def _build(corpus: Corpus, root: Path, key: str, work: Path, out: Path, progress: Progress) -> None:
    cache = root / ".cache" if corpus.source == "hub" else work
    collected = _collect(corpus, cache, work, progress)
    codec = _codec(corpus, collected, progress)
    dtype = np.dtype("<u2" if codec.vocab_size <= 2**16 else "<u4")
    streams, tokens = _pack(collected, codec, dtype, work, out, progress)
    np.save(out / "token_bytes.npy", codec.token_bytes)
    (out / "tokenizer.json").write_text(codec.content(), encoding="utf-8")
    kept = sum(collected.bytes.values())
    card = {
        "format": FORMAT,
        "key": key,
        "source": _source(corpus),
        "licence": corpora.licence(corpus),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in ("datasets", "tokenizers", "polars")},
        "data_hash": collected.data_hash,
        "duplicates_dropped": collected.duplicates,
        "empty_dropped": collected.empty,
        "splits": {
            s: {
                "documents": collected.documents[s],
                "bytes": collected.bytes[s],
                "tokens": tokens[s],
                "stream": streams[s],
            }
            for s in SPLITS
        },
        "tokenizer": {
            "kind": corpus.tokenizer,
            "hash": codecs.content_hash(codec),
            "vocab_size": codec.vocab_size,
            "end_id": codec.end_id,
            "dtype": dtype.str,
            "tokens_per_byte": sum(tokens.values()) / kept,
        },
        "files": {path.name: _fingerprint(path) for path in sorted(out.iterdir())},
    }
    (out / "card.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _collect(corpus: Corpus, cache: Path, work: Path, progress: Progress, held_out: bytes | None = None) -> _Collected:
    """Read the source once: drop empty texts and exact duplicates, give each document its split.

    Where chance gives validation nothing, the source is read again with the training document `held_out` in it: the one
    of the lowest hash. A stream's source cannot spare one, for training reads it by the rule alone.
    """
    found = _Collected()
    lowest: bytes | None = None
    # 16 bytes of SHA-256 a document, about 100 bytes of memory: the one thing here that grows with the corpus.
    seen: set[bytes] = set()
    rows: list[tuple[str, str, str, int, str]] = []
    held = total = 0
    order = hashlib.sha256()

    def flush() -> None:
        nonlocal held
        path = work / f"part-{len(found.parts):06d}.parquet"
        schema = {"id": pl.String, "split": pl.String, "name": pl.String, "bytes": pl.Int64, "text": pl.String}
        pl.DataFrame(rows, schema=schema, orient="row").write_parquet(path, compression="lz4")
        found.parts.append(path)
        rows.clear()
        held = 0

    for document in corpora.documents(corpus, cache):
        if not document.text.strip():
            found.empty += 1
            continue
        text = document.text.encode()
        content = hashlib.sha256(text).digest()
        if content[:16] in seen:
            found.duplicates += 1
            continue
        seen.add(content[:16])
        split = "validation" if content[:16] == held_out else split_of(content, corpus)
        if split == "train":
            lowest = min(lowest or content[:16], content[:16])
        rows.append((content[:16].hex(), split, document.name, len(text), document.text))
        order.update(f"{rows[-1][0]} {split}\n".encode())
        found.documents[split] += 1
        found.bytes[split] += len(text)
        held += len(text)
        total += len(text)
        if held >= PART_BYTES:
            flush()
            progress("read", total, None)
        if len(seen) == corpus.max_documents:
            break
    if rows:
        flush()
    progress("read", total, total)
    if not seen:
        raise ConfigError(f"corpus with source {corpus.source!r} is empty: no document with text in it")
    if not found.documents["validation"] and found.documents["train"] > 1 and not corpus.stream:
        return _collect(corpus, cache, work, progress, lowest)
    for split in ("train", "validation"):
        if not found.documents[split]:
            raise ConfigError(
                f"corpus has {len(seen)} document(s), none of them in {split} "
                f"(validation_share is {corpus.validation_share}): give it more documents or another share"
            )
    found.data_hash = order.hexdigest()[:16]
    return found


def _codec(corpus: Corpus, collected: _Collected, progress: Progress) -> codecs.Codec:
    if corpus.tokenizer == "bytes":
        return codecs.ByteCodec()
    if corpus.tokenizer_file:
        return codecs.from_file(expanded(corpus.tokenizer_file))

    def train_texts() -> Iterator[list[str]]:
        done, total = 0, collected.bytes["train"]
        for part in collected.parts:
            table = pl.read_parquet(part, glob=False, columns=["split", "text", "bytes"]).filter(
                pl.col("split") == "train"
            )
            yield table["text"].to_list()
            done += int(table["bytes"].sum())
            progress("train tokenizer", done, total)

    codec = codecs.train(train_texts(), corpus.vocab_size)
    if codec.vocab_size < corpus.vocab_size:
        _log.warning(
            "corpus.vocab_size is %d: the training text gives %d entries, which are used",
            corpus.vocab_size,
            codec.vocab_size,
        )
    return codec


def _pack(
    collected: _Collected, codec: codecs.Codec, dtype: np.dtype[Any], work: Path, out: Path, progress: Progress
) -> tuple[dict[Split, int], dict[Split, int]]:
    """Append every document's ids and an end mark to its split's file. Returns lengths with and without end marks."""
    streams, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    done, total = 0, sum(collected.bytes.values())
    handles: dict[Split, BinaryIO] = {s: (out / f"{s}.bin").open("wb") for s in SPLITS}
    tables = []
    try:
        for number, part in enumerate(collected.parts):
            table = pl.read_parquet(part, glob=False)
            counts: list[int] = []
            for batch in _batches(table):
                for row, ids in zip(
                    batch.iter_rows(named=True), codec.encode_batch(batch["text"].to_list()), strict=True
                ):
                    if int(codec.token_bytes[ids].sum()) != row["bytes"]:
                        raise ConfigError(
                            f"corpus.tokenizer_file changes text: the tokens of {row['name']!r} stand for "
                            f"{int(codec.token_bytes[ids].sum())} bytes of {row['bytes']}; remove its "
                            "prefix space and tokens that swallow blanks"
                        )
                    handles[row["split"]].write(ids.astype(dtype).tobytes())
                    handles[row["split"]].write(np.array([codec.end_id], dtype).tobytes())
                    streams[row["split"]] += len(ids) + 1
                    tokens[row["split"]] += len(ids)
                    counts.append(len(ids))
                done += int(batch["bytes"].sum())
                progress("encode", done, total)
            tables.append(work / f"documents-{number:06d}.parquet")
            table = table.with_columns(tokens=pl.Series(counts, dtype=pl.Int64))
            table.drop("text").write_parquet(tables[-1])
    finally:
        for handle in handles.values():
            handle.close()
    pl.scan_parquet(tables, glob=False).sink_parquet(out / "documents.parquet")
    texts = (
        pl.scan_parquet(collected.parts, glob=False)
        .filter(pl.col("split") != "train")
        .select("id", "split", "name", "text")
    )
    texts.sink_parquet(out / "held_out.parquet")
    return streams, tokens


def _batches(table: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Consecutive slices of about BATCH_BYTES of text."""
    groups = ((table["bytes"].cum_sum() - 1) // BATCH_BYTES).alias("group")
    start = 0
    for length in groups.value_counts(sort=False).sort("group")["count"]:
        yield table.slice(start, length)
        start += length


def _source(corpus: Corpus) -> dict[str, Any]:
    """The settings that matter, by name; for the Hub with the settings of its preset."""
    settings = {k: v for k, v in corpus.model_dump(mode="json").items() if v is not None}
    if corpus.source == "hub":
        arguments = corpora.hub_arguments(corpus, Path())
        settings |= {"name": arguments["path"], "configuration": arguments["name"]}
    return settings


# --- checks


def _fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= 2 * EDGE:
            return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        ends = hashlib.sha256(file.read(EDGE))
        file.seek(size - EDGE)
        ends.update(file.read(EDGE))
        return {"size": size, "ends": ends.hexdigest()}


def _check(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise _damaged(path, "missing")
    if (size := path.stat().st_size) != expected["size"]:
        what = "truncated" if size < expected["size"] else "too long"
        raise _damaged(path, f"{what}: {size} bytes, {expected['size']} were written")
    if _fingerprint(path) != expected:
        raise _damaged(path, "corrupt: its content is not what was written")


def _map(path: Path, dtype: np.dtype[Any], length: int) -> Stream:
    if path.stat().st_size != length * dtype.itemsize:
        raise _damaged(path, f"{path.stat().st_size} bytes for {length} tokens of {dtype.name}")
    if length == 0:  # an empty file cannot be mapped
        empty: Stream = np.empty(0, dtype)
        empty.flags.writeable = False
        return empty
    return np.memmap(path, dtype, mode="r", shape=(length,))


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(f"token file {str(path)!r} is {what}; run `ablate prepare` to make it again")
