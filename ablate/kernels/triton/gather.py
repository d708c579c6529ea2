"""Triton kernel that walks a tree row by row: every token reads its own weight rows. Jit functions only.

The strategy for few tokens and for levels so deep that few tokens share a subtree. Output by rows is part of
`tiles.spread`.
"""
# mypy: ignore-errors
# Triton's jit functions take blocks and constexprs that Python's types cannot describe.

import triton
import triton.language as tl


@triton.jit
def _row_dot(n, flat, valid, a_ptr, w_ptr, d, EVEN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """<a[n], w[flat]> for each token of the block: [BT], summed in fp32 over BD columns side by side."""
    cols = tl.arange(0, BD)
    acc = tl.zeros((BT, BD), tl.float32)
    for c in range(0, d, BD):
        if EVEN:
            mask = valid[:, None]
        else:
            mask = valid[:, None] & (c + cols < d)[None, :]
        a = tl.load(a_ptr + n[:, None] * d + (c + cols)[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + flat[:, None] * d + (c + cols)[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += a * w
    return tl.sum(acc, axis=1)


@triton.jit(
    do_not_specialize=["tokens", "trees", "tree0", "path", "rows", "nodes", "row_base", "depth", "level0", "width"]
)
def row_dots(
    a_ptr,  # [N, d]
    code_ptr,  # [N, K] int32: the leaf; with ROUTE the node reached at level0, replaced by the leaf
    perm_ptr,  # [K, N] int32, read if SORTED
    w_ptr,  # [K, rows, d]
    b_ptr,  # [K, rows], read if BIAS
    t_ptr,  # [K, M] fp32, read if THRESHOLDS
    v_ptr,  # [N, K, P] fp32, columns [level0, D) and, with LEAVES, [D, P) are written
    tokens,
    trees,
    tree0,
    d,
    path,
    rows,
    nodes,
    row_base,
    depth,
    level0,
    width,
    ROUTE: tl.constexpr,
    LEAVES: tl.constexpr,
    SORTED: tl.constexpr,
    BIAS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    EVEN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """v[n, k, u] = <a[n], w[k, u]> (+ b) for the path's nodes of levels [level0, D) and, with LEAVES, the leaf's W
    units; with ROUTE each level's response chooses the next node.

    Grid (cdiv(N, BT), trees). Ownership: program (i, k) alone reads and writes code[n, k] and v[n, k, :] for the tokens
    n of block i of the order, which is a permutation.
    """
    k = tree0 + tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    valid = t < tokens
    if SORTED:
        n = tl.load(perm_ptr + k * tokens + t, mask=valid, other=0).to(tl.int64)
    else:
        n = t.to(tl.int64)
    code = tl.load(code_ptr + n * trees + k, mask=valid, other=0)
    at = (n * trees + k) * path
    tree_row = k * rows
    for level in range(level0, depth):
        if ROUTE:
            node = (1 << level) - 1 + code
        else:
            node = (1 << level) - 1 + (code >> (depth - level))
        v = _row_dot(n, (tree_row + node).to(tl.int64), valid, a_ptr, w_ptr, d, EVEN, BT, BD)
        if BIAS:
            v += tl.load(b_ptr + tree_row + node, mask=valid, other=0.0).to(tl.float32)
        tl.store(v_ptr + at + level, v, mask=valid)
        if ROUTE:
            if THRESHOLDS:
                right = v > tl.load(t_ptr + k * nodes + node, mask=valid, other=0.0)
            else:
                right = v > 0.0
            code = 2 * code + right.to(tl.int32)
    if ROUTE:
        tl.store(code_ptr + n * trees + k, code, mask=valid)
    if LEAVES:
        for unit in range(width):
            row = (tree_row + row_base + code * width + unit).to(tl.int64)
            v = _row_dot(n, row, valid, a_ptr, w_ptr, d, EVEN, BT, BD)
            if BIAS:
                v += tl.load(b_ptr + row, mask=valid, other=0.0).to(tl.float32)
            tl.store(v_ptr + at + depth + unit, v, mask=valid)
