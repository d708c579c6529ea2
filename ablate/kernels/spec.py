"""What a tree feed-forward layer computes, as far as a kernel needs to know; without torch, so that settings import it.

Shape alphabet (used in every docstring, test and plot of this project):
N tokens (batch x time, flattened) · d model width · K trees · D depth · L = 2^D leaves per tree · W leaf width ·
M = 2^D - 1 internal nodes per tree · R = M·node_output + L·W output rows per tree · U = K(M + L·W) units ·
A = K(D·node_output + W) units one token activates.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "tanh"]
Placement = Literal["unit", "tree", "sum"]
NodeBackward = Literal["own", "flat", "flip", "base"]


class Traits(NamedTuple):
    """What is known of a base function f beside its values, which `activations` defines."""

    asymmetry: float
    """Nominal gradient asymmetry at mirror 0, to two decimals; `activations.asymmetry` computes it."""
    odd_identity: bool = False
    """Whether f(z) - f(-z) = z, so that mirror -1 is the identity."""
    odd: bool = False
    """Whether f(-z) = -f(z), so that a mirror would only change the gain: mirror 0 is the one allowed."""


TRAITS: dict[Activation, Traits] = {
    "gelu": Traits(0.69, odd_identity=True),
    "gelu_tanh": Traits(0.69, odd_identity=True),
    "relu": Traits(1.0, odd_identity=True),
    "relu2": Traits(1.0),
    "silu": Traits(0.59, odd_identity=True),
    "tanh": Traits(0.0, odd=True),
}
ACTIVATIONS = tuple(TRAITS)


def is_identity(activation: Activation, mirror: float) -> bool:
    """Return whether f(z) + mirror·f(-z) is exactly z: mirror -1 of GELU (either form), ReLU and SiLU."""
    return mirror == -1.0 and TRAITS[activation].odd_identity


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeSpec:
    """Shape and nonlinearity of one tree layer; routing settings reach a kernel only as thresholds or given leaves.

    `node_gain` and `leaf_gain` multiply phi of node units and of leaf units (1 for `gain: raw`). For the placements
    `tree` and `sum`, phi is applied to summed outputs and is the leaf's (`mirror`, `leaf_gain`).
    """

    trees: int
    depth: int
    leaf_width: int
    node_output: bool = True
    placement: Placement = "unit"
    activation: Activation = "gelu"
    mirror: float = 0.0
    node_mirror: float = 0.0
    node_gain: float = 1.0
    leaf_gain: float = 1.0
    key: str = field(init=False, compare=False, repr=False)
    """The fields as text, which `parse_spec` reads: operators of `torch.library` take no classes of ours."""

    def __post_init__(self) -> None:
        values = tuple(getattr(self, f.name) for f in fields(self) if f.init)
        object.__setattr__(self, "key", repr(values))

    @property
    def leaves(self) -> int:
        """L, leaves per tree."""
        return 1 << self.depth

    @property
    def nodes(self) -> int:
        """M, internal nodes per tree."""
        return (1 << self.depth) - 1

    @property
    def in_rows(self) -> int:
        """Rows of `w_in` per tree: M + L·W, nodes in heap order, then the leaves' units."""
        return self.nodes + self.leaves * self.leaf_width

    @property
    def out_rows(self) -> int:
        """R, rows of `w_out` per tree: `in_rows` with `node_output`, else L·W."""
        return self.in_rows if self.node_output else self.leaves * self.leaf_width

    @property
    def path(self) -> int:
        """D + W, responses recorded per token and tree: the path's nodes from the root down, then the leaf's units."""
        return self.depth + self.leaf_width


@functools.lru_cache(maxsize=1024)
def parse_spec(key: str) -> TreeSpec:
    """Return the spec that has this key."""
    names = (f.name for f in fields(TreeSpec) if f.init)
    return TreeSpec(**dict(zip(names, ast.literal_eval(key), strict=True)))
