"""What all passes of the CPU tree layer share: segments of tokens that took one leaf, and products of their rows.

Tokens that took the same leaf are brought together (a partition per tree), and then all work is on segments of tokens
that share rows: weights are read once a segment instead of once a token.
"""

# Numba compiles these functions; it does not read annotations, and mypy sees its decorators as untyped.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, untyped-decorator, var-annotated"
from __future__ import annotations

from ablate.kernels.cpu.jit import jit
from ablate.kernels.cpu.pointwise import phi, slope
from ablate.kernels.cpu.vector import (
    ROWS,
    combine1,
    combine2,
    combine3,
    combine4,
    dots11,
    dots12,
    dots14,
    dots41,
    dots42,
    dots44,
)

CHUNK = 32
"""Tokens of one segment handled at a time: their rows stay in the first-level cache between passes over them."""


@jit
def products(xs, x0, nx, ws, nw, d, out, block):
    """out[t·nw + r] = <x_t, w_r> for nx rows at xs[x0:] and nw rows at ws."""
    for t in range(0, nx - nx % 4, 4):
        r = 0
        if ROWS == 4:
            while r + 4 <= nw:
                dots44(xs, x0 + t, ws, r, d, block, 0)
                for i in range(4):
                    for q in range(4):
                        out[(t + i) * nw + r + q] = block[i * 4 + q]
                r += 4
        while r + 2 <= nw:
            dots42(xs, x0 + t, ws, r, d, block, 0)
            for i in range(4):
                for q in range(2):
                    out[(t + i) * nw + r + q] = block[i * 2 + q]
            r += 2
        if r < nw:
            dots41(xs, x0 + t, ws, r, d, block, 0)
            for i in range(4):
                out[(t + i) * nw + r] = block[i]
    for t in range(nx - nx % 4, nx):
        r = 0
        while r + 4 <= nw:
            dots14(xs, x0 + t, ws, r, d, out, t * nw + r)
            r += 4
        if r + 2 <= nw:
            dots12(xs, x0 + t, ws, r, d, out, t * nw + r)
            r += 2
        if r < nw:
            dots11(xs, x0 + t, ws, r, d, out, t * nw + r)


@jit
def sums(src, s0, count, coef, ci, cs, dst, n, d, add):
    """y_i (+)= sum_s coef[ci·i + cs·s] · row_s for n rows at dst, `count` rows at src[s0:]."""
    i = 0
    while i + 4 <= n:
        combine4(src, s0, count, coef, ci * i, ci, cs, dst, i, d, add)
        i += 4
    left = n - i
    if left == 3:
        combine3(src, s0, count, coef, ci * i, ci, cs, dst, i, d, add)
    elif left == 2:
        combine2(src, s0, count, coef, ci * i, ci, cs, dst, i, d, add)
    elif left == 1:
        combine1(src, s0, count, coef, ci * i, ci, cs, dst, i, d, add)


@jit
def path(leaf, depth, width, nodes, base, row_bytes, has_nodes, ws):
    """Addresses of a leaf's path: its nodes from the root down (if they have rows), then its units."""
    n = 0
    if has_nodes:
        for l in range(depth):
            ws[l] = base + (((leaf + (1 << depth)) >> (depth - l)) - 1) * row_bytes
        n = depth
        base += nodes * row_bytes
    for j in range(width):
        ws[n + j] = base + (leaf * width + j) * row_bytes


@jit
def by_leaf(leaves, k, t0, t1, starts, order):
    """Stable counting sort of tokens t0..t1 by their leaf in tree k, into order; starts [L + 1] is where they begin."""
    L = starts.shape[0] - 1
    starts[:] = 0
    for t in range(t0, t1):
        starts[leaves[t, k] + 1] += 1
    for l in range(L):
        starts[l + 1] += starts[l]
    for t in range(t0, t1):
        l = leaves[t, k]
        order[starts[l]] = t
        starts[l] += 1
    for l in range(L, 0, -1):
        starts[l] = starts[l - 1]
    starts[0] = 0


@jit
def same_leaf(leaves, k, order, p, end):
    """Where the run of tokens that share the leaf of position p ends: at most CHUNK further, at most at `end`."""
    leaf = leaves[order[k, p], k]
    q = p + 1
    end = min(end, p + CHUNK)
    while q < end and leaves[order[k, q], k] == leaf:
        q += 1
    return q


@jit
def activate(z, count, A, width, acts, slopes, out, part):
    """out = phi(z), or its slope, for z [count, A] flat; acts[0] is for nodes, acts[1] for the last `width` columns."""
    nodes = A - width
    if nodes == 0 or (acts[0, 0] == acts[1, 0] and acts[0, 1] == acts[1, 1] and acts[0, 2] == acts[1, 2]):
        if slopes:
            slope(z, count * A, acts[1], out)
        else:
            phi(z, count * A, acts[1], out)
        return
    for half in range(2):
        first, size = (0, nodes) if half == 0 else (nodes, width)
        for i in range(count):
            for u in range(size):
                part[0, i * size + u] = z[i * A + first + u]
        if slopes:
            slope(part[0], count * size, acts[half], part[1])
        else:
            phi(part[0], count * size, acts[half], part[1])
        for i in range(count):
            for u in range(size):
                out[i * A + first + u] = part[1, i * size + u]
