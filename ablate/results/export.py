"""Results for other programs: CSV, and event files that TensorBoard reads, written without TensorBoard."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl

from ablate.files import clear_stale, replacing

EVENTS = "events.out.tfevents.ablate"
SCALARS = ("tokens", "seed", "step")
"""Numbers of an evaluation that are no curves."""
_POLYNOMIAL = 0x82F63B78  # CRC-32C


def to_csv(frames: Mapping[str, pl.DataFrame], folder: Path) -> Path:
    """Write each frame to <folder>/<name>.csv; return the folder."""
    clear_stale(folder)
    for name, frame in frames.items():
        with replacing(folder / f"{name}.csv") as partial:
            frame.write_csv(partial)
    return folder


def to_tensorboard(history: pl.DataFrame, folder: Path) -> Path:
    """Write the curves of each trial to <folder>/<arm>-seed-<seed>-<trial>/; return the folder.

    Args:
        history: one row an evaluation, as in history.parquet.
        folder: what `tensorboard --logdir` is given.
    """
    curves = [c for c, kind in history.schema.items() if kind.is_numeric() and c not in SCALARS]
    for (trial, arm, seed), rows in history.group_by("trial", "arm", "seed", maintain_order=True):
        place = folder / re.sub(r"[^\w.=+-]+", "-", f"{arm}-seed-{seed}-{trial}")
        records = [_event(wall=0.0, version=True)]
        for row in rows.sort("step").iter_rows(named=True):
            scalars = {c: float(row[c]) for c in curves if row[c] is not None}
            records.append(_event(wall=float(row["train_seconds"] or 0), step=int(row["step"]), scalars=scalars))
        with replacing(place / EVENTS) as partial:
            partial.write_bytes(b"".join(map(_record, records)))
    return folder


def _event(*, wall: float, step: int = 0, scalars: Mapping[str, float] | None = None, version: bool = False) -> bytes:
    """Return a serialized `Event`: wall_time 1, step 2, file_version 3, summary 5 with values of tag 1, simple_value 2."""
    parts = [b"\x09", struct.pack("<d", wall), b"\x10", _varint(step)]
    if version:
        parts += [_field(3, b"brain.Event:2")]
    if scalars:
        values = (_field(1, _field(1, n.encode()) + b"\x15" + struct.pack("<f", v)) for n, v in scalars.items())
        parts += [_field(5, b"".join(values))]
    return b"".join(parts)


def _field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _record(content: bytes) -> bytes:
    """Return a TFRecord: length and content, each with its masked checksum."""
    length = struct.pack("<Q", len(content))
    return length + _masked(length) + content + _masked(content)


def _table() -> Iterable[int]:
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        yield byte


_CRC = tuple(_table())


def _masked(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
