"""Triton kernels of the weight gradients: a grouped product over segments of the leaf-sorted tokens. Jit functions
only.

Pieces, tiles and lanes are those of `tiles`. No float atomics: every sum has one owner and a fixed order.
"""
# mypy: ignore-errors
# Triton's jit functions take blocks and constexprs that Python's types cannot describe.

import triton
import triton.language as tl

from ablate.kernels.triton.lanes import NO_LEAF, lanes, load_path, place


@triton.jit(
    do_not_specialize=[
        "tokens",
        "trees",
        "tree0",
        "path",
        "rows",
        "row_base",
        "level",
        "shift",
        "width",
        "group",
        "tiles",
        "chunks",
        "splits",
    ]
)
def tile_wgrad(
    c_ptr,  # [N, K, P] fp32 coefficients on the path: dz for w_in, h for w_out
    a_ptr,  # [N, d] rows to add: x for w_in, the output's gradient for w_out
    leaf_ptr,  # [N, K] int32
    perm_ptr,  # [K, N] int32 tokens sorted by leaf; read if SORTED
    seg_ptr,  # [K, tiles + 1] int32 where each tile's tokens begin in that order
    dw_ptr,  # [K, rows, d]; with PARTIAL [splits, K, tiles·chunks·LANES, d] fp32
    db_ptr,  # [K, rows], written if BIAS; with PARTIAL [splits, K, tiles·chunks·LANES] fp32
    tokens,
    trees,
    tree0,
    d,
    path,
    rows,
    row_base,
    level,
    shift,
    width,
    group,
    tiles,
    chunks,
    splits,
    HEIGHT: tl.constexpr,
    LANES: tl.constexpr,
    SORTED: tl.constexpr,
    BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """dw[k, u] = sum_n c[n, k, u] a[n] over the tokens n whose path holds u, and db[k, u] = sum_n c[n, k, u]: one
    product [LANES, BT]·[BT, BD] per BT tokens of the tile's segment, in the segment's order.

    Grid (tiles·chunks, cdiv(d, BD), trees·splits). A segment is cut into `splits` runs, whose sums `fold` adds in
    order.
    Ownership: without PARTIAL the program of tile i, chunk c, column block e, tree k alone writes rows of that tile's
    units (tiles of a piece are disjoint sets of rows, and so are pieces) in columns e; the bias goes with e = 0. With
    PARTIAL every program has a [LANES, BD] block of its own. Rows of tiles without tokens are written too, as zeros.
    """
    tile = tl.program_id(0) // chunks
    first = (tl.program_id(0) % chunks) * LANES
    k = tree0 + tl.program_id(2) // splits
    s = tl.program_id(2) % splits
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    lo = tl.load(seg_ptr + k * (tiles + 1) + tile)
    hi = tl.load(seg_ptr + k * (tiles + 1) + tile + 1)
    run = tl.cdiv(tl.cdiv(hi - lo, splits), BT) * BT
    lo = lo + s * run
    hi = tl.minimum(hi, lo + run)
    dw = tl.zeros((LANES, BD), tl.float32)
    db = tl.zeros((LANES,), tl.float32)
    for t0 in range(lo, hi, BT):
        t = t0 + tl.arange(0, BT)
        valid = t < hi
        if SORTED:
            n = tl.load(perm_ptr + k * tokens + t, mask=valid, other=0).to(tl.int64)
        else:
            n = t.to(tl.int64)
        leaf = tl.load(leaf_ptr + n * trees + k, mask=valid, other=NO_LEAF)
        local = place(leaf, tile, shift, group, HEIGHT)
        coef = load_path(c_ptr, (n * trees + k) * path, local, first, level, width, HEIGHT, LANES)
        if EVEN:
            a = tl.load(a_ptr + n[:, None] * d + cols[None, :], mask=valid[:, None], other=0.0)
        else:
            a = tl.load(a_ptr + n[:, None] * d + cols[None, :], mask=valid[:, None] & (cols < d)[None, :], other=0.0)
        if INTERPRETED:
            a = a.to(tl.float32)
        dw = tl.dot(tl.trans(coef.to(a.dtype)), a, dw, input_precision="ieee")
        if BIAS:
            db += tl.sum(coef, axis=0)
    row, exists = lanes(tile, first, level, width, group, row_base, HEIGHT, LANES)
    if PARTIAL:
        lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
        flat = ((s * trees + k) * tiles * chunks * LANES + lane).to(tl.int64)
    else:
        flat = (k * rows + row).to(tl.int64)
    tl.store(dw_ptr + flat[:, None] * d + cols[None, :], dw, mask=exists[:, None] & (cols < d)[None, :])
    if BIAS and tl.program_id(1) == 0:
        tl.store(db_ptr + flat, db, mask=exists)


@triton.jit(
    do_not_specialize=["trees", "tree0", "rows", "row_base", "level", "width", "group", "tiles", "chunks", "splits"]
)
def fold(
    part_ptr,  # [splits, K, tiles·chunks·LANES, d] fp32
    part_b_ptr,  # [splits, K, tiles·chunks·LANES] fp32, read if BIAS
    dw_ptr,  # [K, rows, d], written
    db_ptr,  # [K, rows], written if BIAS
    trees,
    tree0,
    d,
    rows,
    row_base,
    level,
    width,
    group,
    tiles,
    chunks,
    splits,
    HEIGHT: tl.constexpr,
    LANES: tl.constexpr,
    BIAS: tl.constexpr,
    BD: tl.constexpr,
):
    """dw and db of one piece: the partial sums of `tile_wgrad`, added in the order of the splits.

    Grid (tiles·chunks, cdiv(d, BD), trees). Ownership: as `tile_wgrad` without PARTIAL.
    """
    tile = tl.program_id(0) // chunks
    first = (tl.program_id(0) % chunks) * LANES
    k = tree0 + tl.program_id(2)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    row, exists = lanes(tile, first, level, width, group, row_base, HEIGHT, LANES)
    mask = exists[:, None] & (cols < d)[None, :]
    dw = tl.zeros((LANES, BD), tl.float32)
    db = tl.zeros((LANES,), tl.float32)
    for s in range(splits):
        flat = ((s * trees + k) * tiles * chunks * LANES + lane).to(tl.int64)
        dw += tl.load(part_ptr + flat[:, None] * d + cols[None, :], mask=mask, other=0.0)
        if BIAS:
            db += tl.load(part_b_ptr + flat, mask=exists, other=0.0)
    flat = (k * rows + row).to(tl.int64)
    tl.store(dw_ptr + flat[:, None] * d + cols[None, :], dw, mask=mask)
    if BIAS and tl.program_id(1) == 0:
        tl.store(db_ptr + flat, db, mask=exists)
