"""How one call is cut into tasks for the threads: a function of the shape and the number of threads, never of a clock."""

from __future__ import annotations

from typing import NamedTuple

from ablate.kernels.spec import TreeSpec

BLOCK = 32768
"""Most tokens that one task sorts among a tree's nodes; from 2,048 on, times differ by less than 5%."""


class Tasks(NamedTuple):
    """The cut of one call."""

    block: int
    """Tokens of one task on the way down."""
    range: int
    """Places in leaf order of one task on the way up and back."""
    chunks: int
    """Tasks of one tree for the weight gradients."""


def cut(tokens: int, spec: TreeSpec, threads: int) -> Tasks:
    """Return few large tasks for a layer over `tokens` tokens, but two a thread so that none waits long."""
    wanted = 1 if threads == 1 else 2 * threads
    blocks = max(-(-wanted // spec.trees), -(-tokens // BLOCK))
    block = max(1, -(-tokens // blocks))
    part = max(1, min(BLOCK, -(-tokens // (4 * wanted))))
    return Tasks(block, part, max(1, min(-(-16 // spec.trees), tokens // 128)))
