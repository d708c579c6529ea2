"""The meaning of the lanes of a weight tile: the geometry that all tile kernels share. Jit functions only."""
# mypy: ignore-errors
# Triton's jit functions take blocks and constexprs that Python's types cannot describe.

import triton
import triton.language as tl

NO_TILE = tl.constexpr(1 << 30)  # larger than any tile's number
NO_LEAF = tl.constexpr(1 << 30)  # larger than any leaf's number, and still after any shift of up to 14


@triton.jit
def _heap_levels(LANES: tl.constexpr):
    """floor(log2(j + 1)) for each lane j: its level within a subtree in heap order."""
    level = tl.zeros((LANES,), tl.int32)
    for s in tl.static_range(1, 7):
        level += (tl.arange(0, LANES) + 1 >= (1 << s)).to(tl.int32)
    return level


@triton.jit
def lanes(tile, first, level, width, group, row_base, HEIGHT: tl.constexpr, LANES: tl.constexpr):
    """Return what the lanes of a tile mean: their rows of w_in or w_out within the tree, and which of them exist; [LANES].

    `first` is the first unit of a leaf tile (0 but for leaves wider than a tile), `row_base` the first leaf unit's row.
    """
    j = tl.arange(0, LANES)
    if HEIGHT > 0:
        below = _heap_levels(LANES)
        row = ((tile + (1 << level)) << below) - 1 + (j + 1 - (1 << below))
        exists = below < HEIGHT
    else:
        units = width << group
        row = row_base + tile * units + first + j
        exists = first + j < units
    return row, exists


@triton.jit
def place(leaf, tile, shift, group, HEIGHT: tl.constexpr):
    """Where tokens leave a tile: child of the subtree, or leaf within the group; out of range if they never enter it.

    It depends on the tile, so that compilers cannot hoist the [BT, LANES] masks made of it out of loops over tiles.
    """
    if HEIGHT > 0:
        local = (leaf >> (shift - HEIGHT)) - (tile << HEIGHT)
    else:
        local = leaf - (tile << group)
    return local


@triton.jit
def on_path(local, first, level, width, HEIGHT: tl.constexpr, LANES: tl.constexpr):
    """Which lanes are on each token's path, [BT, LANES], and the path column [LANES] each is recorded in; `local` is
    `place`. Tokens outside the tile have no lane."""
    j = tl.arange(0, LANES)
    if HEIGHT > 0:
        below = _heap_levels(LANES)
        above = local[:, None] >> tl.maximum(HEIGHT - below, 0)[None, :]
        on = (below < HEIGHT)[None, :] & (above == (j + 1 - (1 << below))[None, :])
        column = level + below
    else:
        on = local[:, None] == ((first + j) // width)[None, :]
        column = level + (first + j) % width
    return on, column


@triton.jit
def load_path(c_ptr, at, local, first, level, width, HEIGHT: tl.constexpr, LANES: tl.constexpr):
    """Coefficients of one tile's lanes, [BT, LANES] fp32: the token's own where its path holds the lane's unit, else 0.

    `at` [BT] is where a token's path begins in c.
    """
    on, column = on_path(local, first, level, width, HEIGHT, LANES)
    return tl.load(c_ptr + at[:, None] + column[None, :], mask=on, other=0.0)


@triton.jit
def store_path(v_ptr, at, v, member, local, first, level, width, HEIGHT: tl.constexpr, LANES: tl.constexpr):
    """The reverse of `load_path`: of v [BT, LANES] keep, for each token of the tile, the lanes on its path."""
    if HEIGHT > 0:
        for s in tl.static_range(HEIGHT):
            lane = (1 << s) - 1 + (local >> (HEIGHT - s))
            own = tl.sum(tl.where(lane[:, None] == tl.arange(0, LANES)[None, :], v, 0.0), axis=1)
            tl.store(v_ptr + at + level + s, own, mask=member)
    else:
        on, column = on_path(local, first, level, width, HEIGHT, LANES)
        tl.store(v_ptr + at[:, None] + column[None, :], v, mask=on & member[:, None])
