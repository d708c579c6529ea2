"""Which strategy and configurations were measured to be fastest on this machine's device: a small table on disk.

Only `tune` writes it. Without an entry the shipped defaults hold, so two machines without a table choose alike.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ablate.files import write_text
from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton.tiling import DType, Strategy

_VERSION = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """One shape on one device: the strategy, and by kernel the place of the configuration in its shipped list."""

    strategy: Strategy
    configs: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def path() -> Path:
    """The table's file: $ABLATE_KERNEL_CACHE, or kernels.json in the user's cache folder."""
    chosen = os.environ.get("ABLATE_KERNEL_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(chosen) if chosen else cache / "ablate" / "kernels.json"


def bucket_of(tokens: int) -> int:
    """The least power of two that is no less than the token count (1 for 0)."""
    return 1 << max(0, tokens - 1).bit_length()


def lookup(device: str, spec: TreeSpec, tokens: int, d: int, dtype: DType) -> Entry | None:
    """The measured entry for a shape, or None; token counts share one up to the next power of two."""
    return _table(str(path())).get(_key(device, spec, tokens, d, dtype))


def record(device: str, spec: TreeSpec, tokens: int, d: int, dtype: DType, entry: Entry) -> None:
    """Add an entry to the table, replacing the file in one step."""
    file = path()
    content: dict[str, Any] = {"version": _VERSION, "entries": {}}
    if file.exists():
        found = json.loads(file.read_text())
        if found.get("version") == _VERSION:
            content = found
    content["entries"][_key(device, spec, tokens, d, dtype)] = asdict(entry)
    write_text(file, json.dumps(content, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()


def _key(device: str, spec: TreeSpec, tokens: int, d: int, dtype: DType) -> str:
    """What speed depends on; activation and gains are not part of it."""
    shape = f"K{spec.trees} D{spec.depth} W{spec.leaf_width} nodes {spec.node_output} {spec.placement}"
    return f"{device} | {shape} | d {d} | {dtype} | tokens {bucket_of(tokens)}"


@functools.cache
def _table(file: str) -> dict[str, Entry]:
    if not Path(file).exists():
        return {}
    content = json.loads(Path(file).read_text())
    if content.get("version") != _VERSION:
        return {}
    return {key: Entry(**value) for key, value in content["entries"].items()}
