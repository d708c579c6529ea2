"""Triton kernels of the tree layer that multiply matrices: one 16 to 64 wide tile of weight rows at a time. Jit only.

A *piece* is what a tile is made of, and every kernel here takes both kinds:

- subtree (HEIGHT h > 0): the 2^h - 1 nodes of levels [level, level + h) below one node of that level. Lane j holds the
  subtree's node of heap number j, so the h branch signs of a token's walk sit in one machine word.
- leaves (HEIGHT 0): the W units of 2^group neighbouring leaves, or, where W exceeds a tile, LANES of one leaf's units.

Either way the tile that a token belongs to is `leaf >> shift`. A block of tokens visits the distinct tiles of its
tokens in rising order, so no block table is needed and the grid never depends on data: tokens sorted by leaf make that
one or two visits (strategy `tiles`), unsorted tokens visit every tile they need (`masked`, the shallow trees').

Shapes: see `spec`; P = D + W columns of a path, LANES = tile width, BT tokens and BD columns of d per block. All
arithmetic is fp32; matrix products take their operands in the weights' dtype (INTERPRETED: fp32, as Triton's
interpreter cannot compute in bf16) and accumulate in fp32, never TF32: rounding there would flip branch signs.
"""
# mypy: ignore-errors
# Triton's jit functions take blocks and constexprs that Python's types cannot describe.

import triton
import triton.language as tl

from ablate.kernels.triton.lanes import NO_TILE, lanes, place, store_path

# Only d is worth specialising (its divisibility makes loads wide); the host keeps every other count below 2^31.


@triton.jit(
    do_not_specialize=[
        "tokens",
        "trees",
        "tree0",
        "path",
        "rows",
        "nodes",
        "row_base",
        "level",
        "shift",
        "width",
        "group",
    ]
)
def tile_dots(
    a_ptr,  # [N, d] rows to multiply: x (forward) or the output's gradient (backward)
    code_ptr,  # [N, K] int32: the leaf; with ROUTE the node reached at `level` (0 leftmost), replaced by the one below
    perm_ptr,  # [K, N] int32 order of the tokens; read if SORTED
    w_ptr,  # [K, rows, d]
    b_ptr,  # [K, rows], read if BIAS
    t_ptr,  # [K, M] fp32, read if THRESHOLDS
    v_ptr,  # [N, K, P] fp32, the piece's columns are written
    tokens,
    trees,
    tree0,  # first tree
    d,
    path,
    rows,
    nodes,
    row_base,  # row of the first leaf unit
    level,  # first level of the subtrees; D for leaves
    shift,  # a token's tile is code >> shift
    width,
    group,
    HEIGHT: tl.constexpr,
    LANES: tl.constexpr,
    ROUTE: tl.constexpr,
    SORTED: tl.constexpr,
    BIAS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    EVEN: tl.constexpr,  # d is a multiple of BD
    INTERPRETED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """v[n, k, u] = <a[n], w[k, u]> (+ b) for the units u of one piece that are on token n's path in tree k; with ROUTE
    the path is chosen here: all of a subtree's responses are computed, their signs packed in a word, and the walk is
    HEIGHT shifts of it.

    Grid (cdiv(N, BT), trees, chunks of a wide leaf).
    Ownership: a token is in one block of the order (perm is a permutation), belongs to one tile of the piece, and its
    path columns are those of that tile; chunks of a leaf are different columns. So program (i, k, c) alone writes v[n,
    k, columns of chunk c] and, with ROUTE (one chunk), code[n, k], for the n of block i; it reads code[n, k] of these n
    alone, before it writes.
    """
    k = tree0 + tl.program_id(1)
    first = tl.program_id(2) * LANES
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    valid = t < tokens
    if SORTED:
        n = tl.load(perm_ptr + k * tokens + t, mask=valid, other=0).to(tl.int64)
    else:
        n = t.to(tl.int64)
    code = tl.load(code_ptr + n * trees + k, mask=valid, other=0)
    tile_of = tl.where(valid, code >> shift, NO_TILE)
    cols = tl.arange(0, BD)
    tile = tl.min(tile_of, axis=0)
    while tile < NO_TILE:
        row, exists = lanes(tile, first, level, width, group, row_base, HEIGHT, LANES)
        flat = (k * rows + row).to(tl.int64)
        v = tl.zeros((BT, LANES), tl.float32)
        for c in range(0, d, BD):
            if EVEN:
                a = tl.load(a_ptr + n[:, None] * d + (c + cols)[None, :], mask=valid[:, None], other=0.0)
                w = tl.load(w_ptr + flat[:, None] * d + (c + cols)[None, :], mask=exists[:, None], other=0.0)
            else:
                inside = (c + cols < d)[None, :]
                a = tl.load(a_ptr + n[:, None] * d + (c + cols)[None, :], mask=valid[:, None] & inside, other=0.0)
                w = tl.load(w_ptr + flat[:, None] * d + (c + cols)[None, :], mask=exists[:, None] & inside, other=0.0)
            if INTERPRETED:
                a = a.to(tl.float32)
                w = w.to(tl.float32)
            v = tl.dot(a, tl.trans(w), v, input_precision="ieee")
        if BIAS:
            v += tl.load(b_ptr + flat, mask=exists, other=0.0).to(tl.float32)[None, :]
        member = tile_of == tile
        if ROUTE:
            if THRESHOLDS:
                right = v > tl.load(t_ptr + k * nodes + row, mask=exists, other=0.0)[None, :]
            else:
                right = v > 0.0
            word = tl.sum(right.to(tl.int64) << tl.arange(0, LANES)[None, :].to(tl.int64), axis=1)
            node = tl.zeros((BT,), tl.int64)
            for _ in tl.static_range(HEIGHT):
                node = 2 * node + 1 + ((word >> node) & 1)
            local = (node - ((1 << HEIGHT) - 1)).to(tl.int32)
            tl.store(code_ptr + n * trees + k, (tile << HEIGHT) + local, mask=member)
        else:
            local = place(code, tile, shift, group, HEIGHT)
        store_path(v_ptr, (n * trees + k) * path, v, member, local, first, level, width, HEIGHT, LANES)
        tile = tl.min(tl.where(tile_of > tile, tile_of, NO_TILE), axis=0)
