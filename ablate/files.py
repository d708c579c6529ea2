"""Replace a file or folder in one step: a reader sees the old content or the new, never half of either."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
_NUMBERS = """
    ENOSPC EDQUOT EFBIG EROFS EIO ESTALE EACCES EPERM ENOMEM EMFILE ENFILE ENODEV ENXIO ENOTCONN EREMOTEIO EHOSTDOWN
    EHOSTUNREACH ENETDOWN ENETUNREACH ECONNREFUSED ECONNRESET ECONNABORTED ETIMEDOUT EPIPE
"""
_MACHINE = {getattr(errno, name) for name in _NUMBERS.split() if hasattr(errno, name)}
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "pytorchstreamwriter failed writing",
    "disk is full",
    "disk i/o error",
    "readonly database",
    "unable to open database",
)
_unfinished: set[Path] = set()
_NUMBER = re.compile(r"\(os error (\d+)\)")  # polars and other libraries in Rust


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a new file to write beside `path`; at the end, flush it to disk and rename it to `path`.

    Missing folders are made. If the block raises, the new file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    _unfinished.add(partial)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        _unfinished.discard(partial)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give a new, empty folder beside `path`; at the end, it takes the place of `path`, which may exist."""
    partial = _beside(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _unfinished.add(partial)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unfinished.discard(partial)


def write_text(path: Path, text: str) -> Path:
    """Replace a UTF-8 text file in one step; returns its path."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def leftovers(folder: Path) -> list[Path]:
    """Return the half-written files that killed processes left in a folder, sorted; none where it does not exist."""
    return sorted(folder.glob(f".*{PARTIAL}"))


def working_folder(folder: Path, name: str) -> Path:
    """Return a new folder in `folder` for this process to work in; `stale_folders` finds those of killed processes."""
    made = folder / f".{name}.{os.getpid()}{PARTIAL}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    _unfinished.add(made)
    return made


def drop_unfinished() -> None:
    """Remove what this process has half written; for one that ends without going through its blocks' ends."""
    for partial in list(_unfinished):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def stale_folders(folder: Path) -> list[Path]:
    """Return the working folders in a folder whose process is gone, sorted."""
    return sorted(path for path in leftovers(folder) if path.is_dir() and not _lives(path))


def clear_stale(folder: Path) -> None:
    """Remove the half-written files in a folder whose process is gone; a command does so where it writes."""
    for partial in leftovers(folder):
        if partial.is_file() and not _lives(partial):
            partial.unlink(missing_ok=True)


def _lives(partial: Path) -> bool:
    """Whether the process that a half-written file or folder is named after is still there, on this machine."""
    number = partial.name.removesuffix(PARTIAL).rpartition(".")[2]
    try:
        os.kill(int(number), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")


def machine_fault(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is the machine's: its disks, memory or network."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE):
            return True
        text = str(error).lower()
        if any(words in text for words in _WORDS) or any(int(n) in _MACHINE for n in _NUMBER.findall(text)):
            return True
        error = error.__cause__ or error.__context__
    return False


def described(error: BaseException) -> str:
    """Return what a machine could not do, in one line: the file and the system's words, where there are any."""
    found: BaseException | None = error
    said = ""
    while found is not None and not isinstance(found, OSError | MemoryError):
        line = next(iter(str(found).splitlines()), "")
        said = line if any(words in line.lower() for words in _WORDS) else said
        found = found.__cause__ or found.__context__
    if isinstance(found, OSError) and found.strerror:
        return f"{found.strerror}: {found.filename!r}" if found.filename is not None else found.strerror
    if isinstance(found, MemoryError):
        return "out of memory"
    return said or next(iter(str(error).splitlines()), "") or type(error).__name__
