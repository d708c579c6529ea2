"""Triton kernel that adds up the rows of every path: the output from w_out, the input gradient from w_in. Jit only.

Pieces, tiles and lanes are those of `tiles`.
"""
# mypy: ignore-errors
# Triton's jit functions take blocks and constexprs that Python's types cannot describe.

import triton
import triton.language as tl

from ablate.kernels.triton.lanes import NO_LEAF, NO_TILE, lanes, load_path, place
from ablate.kernels.triton.pointwise import phi, slope


@triton.jit
def _add_tile(
    acc, tile, leaf, at, flat_base, cols, c_ptr, w_ptr, d, row_base, first, level, shift, width, group,
    HEIGHT: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc [BT, BD] + (coefficients of the tokens' paths in this tile) @ (the tile's weight rows)."""
    row, exists = lanes(tile, first, level, width, group, row_base, HEIGHT, LANES)
    coef = load_path(c_ptr, at, place(leaf, tile, shift, group, HEIGHT), first, level, width, HEIGHT, LANES)
    flat = (flat_base + row).to(tl.int64)
    if EVEN:
        w = tl.load(w_ptr + flat[:, None] * d + cols[None, :], mask=exists[:, None], other=0.0)
    else:
        w = tl.load(w_ptr + flat[:, None] * d + cols[None, :], mask=exists[:, None] & (cols < d)[None, :], other=0.0)
    if INTERPRETED:
        w = w.to(tl.float32)
    return tl.dot(coef.to(w.dtype), w, acc, input_precision="ieee")


@triton.jit
def _add_stage(
    acc, valid, leaf, at, flat_base, cols, c_ptr, w_ptr, d, level, depth,
    HEIGHT: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`_add_tile` for every subtree of the stage that starts at `level` and that a token of the block walks."""
    shift = depth - level
    tile_of = tl.where(valid, leaf >> shift, NO_TILE)
    tile = tl.min(tile_of, axis=0)
    while tile < NO_TILE:
        acc = _add_tile(
            acc, tile, leaf, at, flat_base, cols, c_ptr, w_ptr, d, 0, 0, level, shift, 1, 0,
            HEIGHT, LANES, EVEN, INTERPRETED,
        )  # fmt: skip
        tile = tl.min(tl.where(tile_of > tile, tile_of, NO_TILE), axis=0)
    return acc


@triton.jit
def _add_tree(
    acc, valid, n, k, cols, c_ptr, leaf_ptr, w_ptr, trees, d, path, rows, depth, row_level, row_base, width, group,
    HEIGHT0: tl.constexpr, HEIGHT1: tl.constexpr, HEIGHT2: tl.constexpr,
    LANES0: tl.constexpr, LANES1: tl.constexpr, LANES2: tl.constexpr,
    ROWS: tl.constexpr, LEAF_LANES: tl.constexpr, EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc [BT, BD] + what the paths of tokens n in tree k add up to."""
    leaf = tl.load(leaf_ptr + n * trees + k, mask=valid, other=NO_LEAF)
    at = (n * trees + k) * path
    flat_base = k * rows
    if HEIGHT0 > 0:
        acc = _add_stage(
            acc, valid, leaf, at, flat_base, cols, c_ptr, w_ptr, d, 0, depth, HEIGHT0, LANES0, EVEN, INTERPRETED
        )
    if HEIGHT1 > 0:
        acc = _add_stage(
            acc, valid, leaf, at, flat_base, cols, c_ptr, w_ptr, d, HEIGHT0, depth, HEIGHT1, LANES1, EVEN, INTERPRETED
        )
    if HEIGHT2 > 0:
        acc = _add_stage(
            acc, valid, leaf, at, flat_base, cols, c_ptr, w_ptr, d, HEIGHT0 + HEIGHT1, depth,
            HEIGHT2, LANES2, EVEN, INTERPRETED,
        )  # fmt: skip
    inside = valid[:, None] & (cols < d)[None, :]
    if ROWS:
        for level in range(row_level, depth):
            row = (1 << level) - 1 + (leaf >> (depth - level))
            coef = tl.load(c_ptr + at + level, mask=valid, other=0.0)
            flat = (flat_base + row).to(tl.int64)
            w = tl.load(w_ptr + flat[:, None] * d + cols[None, :], mask=inside, other=0.0)
            acc += coef[:, None] * w.to(tl.float32)
    if LEAF_LANES > 0:
        tile_of = tl.where(valid, leaf >> group, NO_TILE)
        tile = tl.min(tile_of, axis=0)
        while tile < NO_TILE:
            for first in range(0, width << group, LEAF_LANES):
                acc = _add_tile(
                    acc, tile, leaf, at, flat_base, cols, c_ptr, w_ptr, d, row_base, first, depth, group, width, group,
                    0, LEAF_LANES, EVEN, INTERPRETED,
                )  # fmt: skip
            tile = tl.min(tl.where(tile_of > tile, tile_of, NO_TILE), axis=0)
    else:
        first_unit = flat_base + row_base + tl.where(valid, leaf, 0) * width  # NO_LEAF times a width overflows
        for unit in range(width):
            coef = tl.load(c_ptr + at + depth + unit, mask=valid, other=0.0)
            flat = (first_unit + unit).to(tl.int64)
            w = tl.load(w_ptr + flat[:, None] * d + cols[None, :], mask=inside, other=0.0)
            acc += coef[:, None] * w.to(tl.float32)
    return acc


@triton.jit(
    do_not_specialize=[
        "tokens",
        "trees",
        "tree0",
        "tree1",
        "path",
        "rows",
        "depth",
        "row_level",
        "row_base",
        "width",
        "group",
    ]
)
def spread(
    c_ptr,  # [N, K, P] fp32 coefficients on the path: h or z (forward), dz (backward)
    leaf_ptr,  # [N, K] int32
    perm_ptr,  # [K, N] int32, read if SORTED
    w_ptr,  # [K, rows, d]: w_out (forward) or w_in (backward)
    sum_ptr,  # [N, d] fp32, sum of the trees before; read unless FIRST, written unless LAST
    g_ptr,  # [N, d], read if EPILOGUE is "slope"
    out_ptr,  # [N, d], written if LAST
    tokens,
    trees,
    tree0,
    tree1,
    d,
    path,
    rows,
    depth,
    row_level,  # levels [row_level, D) are added row by row
    row_base,
    width,
    group,
    mirror,
    gain,
    HEIGHT0: tl.constexpr,  # heights of the subtree stages from the root down, 0 for none
    HEIGHT1: tl.constexpr,
    HEIGHT2: tl.constexpr,
    LANES0: tl.constexpr,
    LANES1: tl.constexpr,
    LANES2: tl.constexpr,
    ROWS: tl.constexpr,  # some levels are added row by row
    LEAF_LANES: tl.constexpr,  # width of the leaf tiles; 0: leaf units row by row
    SORTED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    EPILOGUE: tl.constexpr,  # "none", "tree": phi of each tree's sum, "all": phi of the sum, "slope": g·phi'(sum)
    ACT: tl.constexpr,
    MIRRORED: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """out[n] = epilogue(sum over trees k and path units u of c[n, k, u] w[k, u]), trees added in rising order.

    Grid (cdiv(N, BT), cdiv(d, BD)). Unsorted tokens: one launch for all trees [tree0, tree1). SORTED: one launch a
    tree, in the order of that tree's leaves, with the running sum in `sum`; a block of leaf-sorted tokens shares its
    tile at every level, so all pieces of the tree are added in registers.
    Ownership: program (i, e) alone reads and writes sum[n, columns e] and out[n, columns e] for the tokens n of block i
    of the order, which is a permutation. Launches of one stream run one after another, so trees never overlap.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    valid = t < tokens
    if SORTED:
        n = tl.load(perm_ptr + tree0 * tokens + t, mask=valid, other=0).to(tl.int64)
    else:
        n = t.to(tl.int64)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = valid[:, None] & (cols < d)[None, :]
    total = tl.zeros((BT, BD), tl.float32)
    if SORTED:
        total = _add_tree(
            total, valid, n, tree0, cols, c_ptr, leaf_ptr, w_ptr, trees, d, path, rows, depth, row_level, row_base,
            width, group, HEIGHT0, HEIGHT1, HEIGHT2, LANES0, LANES1, LANES2, ROWS, LEAF_LANES, EVEN, INTERPRETED,
        )  # fmt: skip
        if EPILOGUE == "tree":
            total = phi(total, mirror, gain, ACT, MIRRORED)
    else:
        for k in range(tree0, tree1):
            acc = tl.zeros((BT, BD), tl.float32) if EPILOGUE == "tree" else total
            acc = _add_tree(
                acc, valid, n, k, cols, c_ptr, leaf_ptr, w_ptr, trees, d, path, rows, depth, row_level, row_base,
                width, group, HEIGHT0, HEIGHT1, HEIGHT2, LANES0, LANES1, LANES2, ROWS, LEAF_LANES, EVEN, INTERPRETED,
            )  # fmt: skip
            total = total + phi(acc, mirror, gain, ACT, MIRRORED) if EPILOGUE == "tree" else acc
    at_out = n[:, None] * d + cols[None, :]
    if not FIRST:
        total += tl.load(sum_ptr + at_out, mask=inside, other=0.0)
    if LAST:
        if EPILOGUE == "all":
            total = phi(total, mirror, gain, ACT, MIRRORED)
        if EPILOGUE == "slope":
            g = tl.load(g_ptr + at_out, mask=inside, other=0.0).to(tl.float32)
            total = g * slope(total, mirror, gain, ACT, MIRRORED)
        tl.store(out_ptr + at_out, total, mask=inside)
    else:
        tl.store(sum_ptr + at_out, total, mask=inside)
