"""Which route the CPU layer takes for a shape: from a shipped, versioned table, never from a clock inside a trial."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from ablate.kernels.spec import TreeSpec

TABLE = "routes_cpu.json"


class Routes(NamedTuple):
    """The table: what was measured, and where.

    `block` is the most tokens that one task of the way down parts among a tree's nodes; `dense_below` the ratio of all
    units to active units below which dense products and a mask are faster.
    """

    version: int
    machine: str
    block: int
    dense_below: float


class Plan(NamedTuple):
    """How one call is cut: a function of the shape, the table and the number of threads alone."""

    dense: bool
    block: int
    """Tokens of one task on the way down."""
    range: int
    """Places in leaf order of one task on the way up and back."""
    chunks: int
    """Tasks of one tree for the weight gradients."""


_pinned: Routes | None = None


@functools.cache
def _shipped() -> Routes:
    """The table that the environment variable ABLATE_ROUTES names, or else the one shipped with this version."""
    own = os.environ.get("ABLATE_ROUTES")
    return read(Path(own).read_text() if own else (resources.files("ablate.kernels.cpu") / TABLE).read_text())


def routes() -> Routes:
    """The table in force."""
    return _shipped() if _pinned is None else _pinned


@contextlib.contextmanager
def using(table: Routes) -> Iterator[None]:
    """Put a table in force until the block ends, in this process: for measuring one and for tests."""
    global _pinned
    before, _pinned = _pinned, table
    try:
        yield
    finally:
        _pinned = before


def read(text: str) -> Routes:
    """A table from its JSON; raises ValueError on a missing or unknown field, or a version this code cannot use."""
    fields = json.loads(text)
    if set(fields) != set(Routes._fields) or fields["version"] != 1:
        raise ValueError(f"{TABLE}: expected version 1 and the fields {Routes._fields}, got {fields}")
    return Routes(**fields)


def plan(tokens: int, d: int, spec: TreeSpec, threads: int, table: Routes | None = None) -> Plan:
    """The cut of a layer over `tokens` tokens: few large tasks, but two a thread so that none waits long."""
    table = routes() if table is None else table
    active = spec.path if spec.node_output else spec.leaf_width
    dense = spec.placement == "unit" and spec.in_rows < table.dense_below * active
    wanted = 1 if threads == 1 else 2 * threads
    blocks = max(-(-wanted // spec.trees), -(-tokens // table.block))
    block = max(1, -(-tokens // blocks))
    part = max(1, min(table.block, -(-tokens // (4 * wanted))))
    return Plan(dense, block, part, max(1, min(-(-16 // spec.trees), tokens // 128)))
