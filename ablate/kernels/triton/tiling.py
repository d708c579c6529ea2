"""How the GPU backend cuts a tree into weight tiles, and the shipped kernel configurations. Pure Python, no torch.

A `Tiling` says which levels go through matrix tiles (`stages`), from which level on single rows are gathered, and how
leaves are grouped. The gradients of the weights have a cut of their own, `grad_pieces`: whatever the forward strategy,
their cost is writing the dense gradient, so all of it goes through tiles.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, NamedTuple

from ablate.kernels.spec import TreeSpec

Strategy = Literal["tiles", "gather", "masked"]
DType = Literal["bf16", "fp32"]
KERNELS = ("tile_dots", "leaf_dots", "row_dots", "spread", "spread_rows", "tile_wgrad", "fold", "activate", "path_grad")
STRATEGIES: tuple[Strategy, ...] = ("tiles", "gather", "masked")

CONFIGS = "configs.json"
TILE_LEVELS = 6  # 63 nodes are one 64-wide matrix tile, and their signs one machine word
MAX_LANES = 64
# Flops through the matrix unit that take as long as one byte of second-level cache traffic, halved because products
# this narrow reach half the unit's speed at best: H100, 600 (bf16) or 40 (fp32, no TF32) TFLOP/s against 5.5 TB/s.
_FLOPS_PER_BYTE: dict[DType, float] = {"bf16": 55.0, "fp32": 3.6}
_ITEM_BYTES: dict[DType, int] = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Piece:
    """Tiles of one kind; the letters are those of the kernels' arguments (see `tiles`).

    `height` > 0: subtrees of that many levels from `level` on. `height` 0: groups of 2^group leaves, `level` = D.
    """

    level: int
    height: int
    shift: int
    width: int
    group: int
    lanes: int
    chunks: int
    tiles: int

    @property
    def units(self) -> int:
        """Units of the piece on one token's path."""
        return self.height or self.width


@dataclass(frozen=True, slots=True)
class Tiling:
    """What one pass over the layer launches: tiles for `stages`, rows from `row_level` on, `leaves` None for rows."""

    strategy: Strategy
    stages: tuple[Piece, ...]
    row_level: int
    leaves: Piece | None
    sorted: bool

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All tile pieces."""
        return self.stages if self.leaves is None else (*self.stages, self.leaves)

    @property
    def sorted_levels(self) -> int:
        """How many levels of the path tokens must be sorted by for every tile to be met in one run; 0 if not sorted."""
        return max((p.tiles.bit_length() - 1 for p in self.pieces), default=0) if self.sorted else 0


class Config(NamedTuple):
    """Block sizes (tokens, columns of d; elements for pointwise kernels), warps and pipeline stages of one kernel."""

    bt: int
    bd: int
    warps: int
    stages: int

    def options(self) -> dict[str, int | bool]:
        """What Triton takes beside the kernel's arguments; fused multiply-add is pinned, as its default changes."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def _lanes(units: int) -> int:
    return max(16, 1 << (units - 1).bit_length())


def heights(depth: int, levels: int = TILE_LEVELS) -> tuple[int, ...]:
    """Levels of each stage from the root down: as few stages of up to `levels` as possible, equal or the first taller.

    Raises ValueError where that takes more than three stages, the most that `spread` adds up at once.
    """
    if depth == 0:
        return ()
    stages = -(-depth // levels)
    if stages > 3:
        raise ValueError(f"depth {depth} takes {stages} stages of {levels} levels; at most 3 are supported")
    return tuple(depth // stages + (i < depth % stages) for i in range(stages))


def subtrees(depth: int, levels: int = TILE_LEVELS) -> tuple[Piece, ...]:
    """The pieces that cover all M nodes of a tree."""
    pieces, level = [], 0
    for h in heights(depth, levels):
        pieces.append(Piece(level, h, depth - level, 1, 0, _lanes((1 << h) - 1), 1, 1 << level))
        level += h
    return tuple(pieces)


def leaf_tiles(spec: TreeSpec, levels: int = TILE_LEVELS) -> Piece:
    """The piece that covers all leaves: small ones share a tile with their neighbours under one last-stage subtree."""
    w = spec.leaf_width
    group = 0 if w > MAX_LANES else (MAX_LANES // w).bit_length() - 1
    group = min(group, heights(spec.depth, levels)[-1] if spec.depth else 0)
    lanes = min(MAX_LANES, _lanes(w << group))
    return Piece(spec.depth, 0, group, w, group, lanes, -(-(w << group) // lanes), spec.leaves >> group)


def grad_pieces(spec: TreeSpec, levels: int = TILE_LEVELS) -> tuple[Piece, ...]:
    """Disjoint pieces that cover every row of a tree: nodes, then leaves."""
    return (*subtrees(spec.depth, levels), leaf_tiles(spec, levels))


def tile_pays(piece: Piece, tokens: int, dtype: DType) -> bool:
    """Whether tiles beat gathered rows for a piece: matrix time of padded blocks of 64 tokens against cache traffic.

    Assumes even use of the tiles; at least 8 tokens must share one, as a block visits its tiles one after another.
    """
    per_tile = tokens / piece.tiles
    flops = 2 * piece.lanes * piece.chunks * (1 + 64 / per_tile)
    return (per_tile >= 8 or piece.height == 0) and flops < _FLOPS_PER_BYTE[dtype] * piece.units * _ITEM_BYTES[dtype]


@functools.lru_cache(maxsize=1024)
def make_tiling(
    spec: TreeSpec, tokens: int, dtype: DType, strategy: Strategy, always_tile: bool = False, levels: int = TILE_LEVELS
) -> Tiling:
    """The tiling of one strategy. `tiles` leaves the levels where tiles do not pay to rows, unless `always_tile`."""
    if strategy == "gather":
        return Tiling("gather", (), 0, None, False)
    cut, leaves = subtrees(spec.depth, levels), leaf_tiles(spec, levels)
    if strategy == "masked":
        return Tiling("masked", cut, spec.depth, leaves, False)
    kept = []
    for piece in cut:
        if piece.level > 0 and not always_tile and not tile_pays(piece, tokens, dtype):
            break
        kept.append(piece)
    row_level = sum(p.height for p in kept)
    with_leaves = always_tile or tile_pays(leaves, tokens, dtype)
    used = (*kept, leaves) if with_leaves else tuple(kept)
    many = any(p.tiles > 1 for p in used)
    return Tiling("tiles", tuple(kept), row_level, leaves if with_leaves else None, many)


@functools.cache
def shipped() -> dict[str, Any]:
    """Return the shipped table of configurations."""
    table: dict[str, Any] = json.loads(resources.files("ablate.kernels.triton").joinpath(CONFIGS).read_text("utf-8"))
    return table


@functools.cache
def configs(kernel: str, dtype: DType) -> tuple[Config, ...]:
    """Shipped configurations of a kernel, the default first; all compile without spills on the targets of `aot`."""
    return tuple(Config(*row) for row in shipped()["configs"][kernel][dtype])
