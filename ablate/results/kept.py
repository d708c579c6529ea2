"""What git keeps of a published study: its file, its plan and its tables, in one archive beside its report.

A hundred small files would be more than a reader of the repository wants to see; `ablate.load` gives them as tables.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

from ablate.config import ConfigError
from ablate.files import replacing

KEPT = "data.zip"
STUDY = "study.yaml"
"""Name of the study file in the archive; the plan and the tables have the names that they have in a project."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


# What the standard library raises for bytes, read already, that are no whole archive: a flipped bit may name another compression.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
)


def pack(folder: Path, archive: Path) -> None:
    """Write the files of a folder to an archive: the same files give the same bytes."""
    with replacing(archive) as partial, zipfile.ZipFile(partial, "w") as target:
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(path.name, _EPOCH)
            # Parquet is compressed already.
            entry.compress_type = zipfile.ZIP_STORED if path.suffix == ".parquet" else zipfile.ZIP_DEFLATED
            target.writestr(entry, path.read_bytes())


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Write an archive's files to a folder and return them; raises ConfigError for a damaged one."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, content in _contents(archive).items():
        path = folder / Path(name).name  # whatever the archive says, nothing is written elsewhere
        path.write_bytes(content)
        found.append(path)
    return found


def table(archive: Path, name: str) -> BytesIO:
    """Return one table of an archive, to be read by polars; raises ConfigError where it is damaged or lacks it."""
    content = BytesIO(archive.read_bytes())
    try:
        with zipfile.ZipFile(content) as source:
            return BytesIO(source.read(name))
    except KeyError:
        raise ConfigError(f"published data {str(archive)!r} have no {name!r}") from None
    except _BROKEN as error:
        raise _damaged(archive, error) from None


def _contents(archive: Path) -> dict[str, bytes]:
    content = BytesIO(archive.read_bytes())
    try:
        with zipfile.ZipFile(content) as source:
            return {name: source.read(name) for name in sorted(source.namelist())}
    except _BROKEN as error:
        raise _damaged(archive, error) from None


def _damaged(archive: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"published data {str(archive)!r} are damaged ({error}): take them from git, or publish the study again"
    )
