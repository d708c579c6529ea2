"""The CPU tree layer's five passes, compiled by Numba; no host logic and no threads of their own.

Every kernel draws tasks from a shared counter until none is left, so any number of threads may run it at once; a task
writes rows that no other task writes, hence results do not depend on how tasks fall to threads. Letters are those of
the shape alphabet; P = D + W responses are kept per token and tree, A of them (the last A) have outputs.

Tokens that took the same leaf are brought together (a partition per tree), and then all work is on segments of tokens
that share rows: weights are read once a segment instead of once a token.
"""

# Numba compiles these functions; it does not read annotations, and mypy sees its decorators as untyped.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, untyped-decorator, var-annotated"
from __future__ import annotations

import numpy as np

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
    dots81,
    fetch_add,
    prefetch,
)

NEAR_BYTES = 1 << 18
"""Rows of x that are parted together near the root: a quarter of a usual second-level cache."""

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
def _path(leaf, depth, width, nodes, base, row_bytes, has_nodes, ws):
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
def _by_leaf(leaves, k, t0, t1, starts, order):
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
def _same_leaf(leaves, k, order, p, end):
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


@jit
def _gather(order, place, t0, begins, spare, level, stack):
    """Stable counting sort of `order` by place[token - t0] in [0, 2^level), and a stack of the nodes that have tokens."""
    begins[:] = 0
    for t in order:
        begins[place[t - t0] + 1] += 1
    for n in range(1 << level):
        begins[n + 1] += begins[n]
    top = 0
    for n in range((1 << level) - 1, -1, -1):
        if begins[n] < begins[n + 1]:
            stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = (
                n + (1 << level) - 1,
                level,
                begins[n],
                begins[n + 1],
            )
            top += 1
    for t in order:
        spare[begins[place[t - t0]]] = t
        begins[place[t - t0]] += 1
    order[:] = spare[: len(order)]
    return top


@jit
def down(counter, x, w_in, b, has_bias, thresholds, has_thresholds, leaves, given, z, orders, depth, width, block):
    """Route, or follow given leaves: z[n, k, :] on the path (its last axis decides whether leaf units are wanted).

    A task is (block of tokens, tree). Depth first: a node's tokens are scored together and parted stably in place, so
    that at the end orders [K, N] holds the block's tokens by leaf. Near the root a node's tokens would not fit in the
    cache, and every level would fetch all of x again: there, small pieces of the block go down `near` levels each, are
    brought together by the node they reached, and go on from it.
    """
    N, d = x.shape
    K = w_in.shape[0]
    M = (1 << depth) - 1
    units = z.shape[2] > depth
    step = d * x.itemsize
    blocks = (N + block - 1) // block
    rights = np.empty(block, np.int64)
    xs = np.empty(block + 2, np.int64)
    ws = np.empty(max(width, 1), np.int64)
    scores = np.empty(max(block + 2, CHUNK * width), z.dtype)
    scratch = np.empty(16, z.dtype)
    piece = max(CHUNK, NEAR_BYTES // step)
    near = 0
    while near < depth and block >> near > piece:
        near += 1
    near = 0 if near < 2 else near
    place = np.empty(block, np.int64)
    begins = np.empty((1 << near) + 1, np.int64)
    stack = np.empty((depth + 2 + (1 << near), 4), np.int64)
    tree_bytes = w_in.shape[1] * step
    while True:
        task = fetch_add(counter)
        if task >= blocks * K:
            break
        k = task % K
        t0 = task // K * block
        t1 = min(N, t0 + block)
        order = orders[k, t0:t1]
        for i in range(t1 - t0):
            order[i] = t0 + i
        base = w_in.ctypes.data + k * tree_bytes
        pieces = (t1 - t0 + piece - 1) // piece if near > 0 else 0
        for run in range(pieces + 1):
            top, stop = 1, near
            stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = 0, 0, run * piece, min((run + 1) * piece, t1 - t0)
            if run == pieces:
                stop = -1
                if pieces == 0:
                    stack[0, 2], stack[0, 3] = 0, t1 - t0
                else:
                    top = _gather(order, place, t0, begins, rights, near, stack)
            while top > 0:
                top -= 1
                n, level, p0, p1 = stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3]
                size = p1 - p0
                if level == stop:
                    for i in range(p0, p1):
                        place[order[i] - t0] = n + 1 - (1 << near)
                    continue
                for i in range(size):
                    xs[i] = x.ctypes.data + order[p0 + i] * step
                if level < depth:
                    ws[0] = base + n * step
                    if level + 1 < depth:
                        prefetch(base + (2 * n + 1) * step, 2 * step)
                    elif units:
                        prefetch(base + (M + (2 * n + 1 - M) * width) * step, 2 * width * step)
                    i = 0
                    while i + 8 <= size:
                        dots81(xs, i, ws, 0, d, scores, i)
                        i += 8
                    if i + 4 <= size:
                        dots41(xs, i, ws, 0, d, scores, i)
                        i += 4
                    if size - i >= 2:
                        # Four products at once take no longer than one, whose additions wait for each other.
                        for j in range(size, i + 4):
                            xs[j] = xs[i]
                        dots41(xs, i, ws, 0, d, scores, i)
                    elif size > i:
                        dots11(xs, i, ws, 0, d, scores, i)
                    bias = b[k, n] if has_bias else z.dtype.type(0)
                    limit = thresholds[k, n] if has_thresholds else z.dtype.type(0)
                    kept, moved = p0, 0
                    for i in range(size):
                        t = order[p0 + i]
                        score = scores[i] + bias
                        z[t, k, level] = score
                        right = (leaves[t, k] >> (depth - 1 - level)) & 1 if given else int(score > limit)
                        # Both are written and one counted: a branch here would be mispredicted every other time.
                        order[kept] = t
                        rights[moved] = t
                        kept += 1 - right
                        moved += right
                    for i in range(moved):
                        order[kept + i] = rights[i]
                    if kept < p1:
                        stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = 2 * n + 2, level + 1, kept, p1
                        top += 1
                    if kept > p0:
                        stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = 2 * n + 1, level + 1, p0, kept
                        top += 1
                else:
                    leaf = n - M
                    if not given:
                        for i in range(p0, p1):
                            leaves[order[i], k] = leaf
                    if units:
                        first = M + leaf * width
                        for j in range(width):
                            ws[j] = base + (first + j) * step
                        for s0 in range(0, size, CHUNK):
                            count = min(CHUNK, size - s0)
                            products(xs, s0, count, ws, width, d, scores, scratch)
                            for i in range(count):
                                t = order[p0 + s0 + i]
                                for j in range(width):
                                    bias = b[k, first + j] if has_bias else z.dtype.type(0)
                                    z[t, k, depth + j] = scores[i * width + j] + bias


@jit
def up(counter, z, acts, w_out, leaves, order, y, add, k0, k1, depth, width, block):
    """y[n] (+)= sum over trees k0..k1 and the path's A units of phi(z) · w_out.

    A task is a range of `block` places of order [K, N]: with several trees, each must hold the same tokens in it.
    """
    N, d = y.shape
    P = depth + width
    has_nodes = w_out.shape[1] > (width << depth)
    A = P if has_nodes else width
    M = (1 << depth) - 1
    step = d * y.itemsize
    blocks = (N + block - 1) // block
    ws = np.empty(A, np.int64)
    ys = np.empty(CHUNK, np.int64)
    coef = np.empty(CHUNK * A, y.dtype)
    taken = np.empty(CHUNK * A, y.dtype)
    part = np.empty((2, CHUNK * A), y.dtype)
    while True:
        task = fetch_add(counter)
        if task >= blocks:
            break
        t0 = task * block
        t1 = min(N, t0 + block)
        for k in range(k0, k1):
            base = w_out.ctypes.data + k * w_out.shape[1] * step
            p = t0
            leaf = -1
            while p < t1:
                count = _same_leaf(leaves, k, order, p, t1) - p
                if leaves[order[k, p], k] != leaf:
                    leaf = leaves[order[k, p], k]
                    _path(leaf, depth, width, M, base, step, has_nodes, ws)
                for i in range(count):
                    t = order[k, p + i]
                    ys[i] = y.ctypes.data + t * step
                    for u in range(A):
                        taken[i * A + u] = z[t, k, P - A + u]
                activate(taken, count, A, width, acts, False, coef, part)
                for i in range(p + count, min(p + count + 8, t1)):
                    prefetch(y.ctypes.data + order[k, i] * step, step)
                sums(ws, 0, A, coef, A, 1, ys, count, d, add or k > k0)
                p += count


@jit
def back(counter, gy, w_out, w_in, z, acts, leaves, order, dz, gx, add, wants_gx, k0, k1, depth, width, block):
    """dz[n, k, :] = phi'(z) · <gy, w_out> on the path, and gx[n] (+)= sum dz · w_in. Tasks are those of `up`."""
    N, d = gy.shape
    P = depth + width
    has_nodes = w_out.shape[1] > (width << depth)
    A = P if has_nodes else width
    M = (1 << depth) - 1
    step = d * gy.itemsize
    blocks = (N + block - 1) // block
    ws = np.empty(P, np.int64)
    gs = np.empty(CHUNK, np.int64)
    xs = np.empty(CHUNK, np.int64)
    coef = np.empty(CHUNK * A, gy.dtype)
    taken = np.empty(CHUNK * A, gy.dtype)
    slopes = np.empty(CHUNK * A, gy.dtype)
    part = np.empty((2, CHUNK * A), gy.dtype)
    scratch = np.empty(16, gy.dtype)
    while True:
        task = fetch_add(counter)
        if task >= blocks:
            break
        t0 = task * block
        t1 = min(N, t0 + block)
        for k in range(k0, k1):
            out_base = w_out.ctypes.data + k * w_out.shape[1] * step
            in_base = w_in.ctypes.data + k * w_in.shape[1] * step
            p = t0
            while p < t1:
                leaf = leaves[order[k, p], k]
                count = _same_leaf(leaves, k, order, p, t1) - p
                for i in range(count):
                    gs[i] = gy.ctypes.data + order[k, p + i] * step
                    xs[i] = gx.ctypes.data + order[k, p + i] * step
                _path(leaf, depth, width, M, out_base, step, has_nodes, ws)
                for i in range(p + count, min(p + count + 8, t1)):
                    prefetch(gy.ctypes.data + order[k, i] * step, step)
                    if wants_gx:
                        prefetch(gx.ctypes.data + order[k, i] * step, step)
                products(gs, 0, count, ws, A, d, coef, scratch)
                for i in range(count):
                    t = order[k, p + i]
                    for u in range(A):
                        taken[i * A + u] = z[t, k, P - A + u]
                activate(taken, count, A, width, acts, True, slopes, part)
                for i in range(count):
                    t = order[k, p + i]
                    for u in range(A):
                        g = coef[i * A + u] * slopes[i * A + u]
                        coef[i * A + u] = g
                        dz[t, k, P - A + u] = g
                if wants_gx:
                    _path(leaf, depth, width, M, in_base, step, True, ws)
                    sums(ws, P - A, A, coef, A, 1, xs, count, d, add or k > k0)
                p += count


@jit
def sort(counter, leaves, k0, k1, starts, order):
    """Tokens by leaf, for each tree: order [K, N] and starts [K, L + 1]. A task is a tree."""
    while True:
        k = k0 + fetch_add(counter)
        if k >= k1:
            break
        _by_leaf(leaves, k, 0, leaves.shape[0], starts[k], order[k])


@jit
def gradients(
    counter, x, gy, z, acts, dz, order, starts, gw_in, gb, gw_out, partial, rows, wants_in, wants_out, k0, k1,
    depth, width,
):  # fmt: skip
    """gw_in, gb and gw_out as sums over each row's segment of sorted tokens. A task is (tree, chunk of that order).

    Rows whose segment lies within a task's chunk are written where they belong; the others, at most one path at either
    end of the chunk, go to partial [K, C, 2, P, 2, d + 1] (side, level, in or out, gradient and bias) with their row
    in `rows` [K, C, 2, P] or -1, for `join` to add up. Rows no token reached are zeroed, tasks sharing them by leaf.
    """
    N, d = x.shape
    C = partial.shape[1]
    L = 1 << depth
    M = L - 1
    P = depth + width
    has_nodes = gw_out.shape[1] > (width << depth)
    A = P if has_nodes else width
    first = P - A
    step = d * x.itemsize
    out_shift = 0 if has_nodes else M
    xs = np.empty(CHUNK, np.int64)
    gs = np.empty(CHUNK, np.int64)
    into = np.empty(P, np.int64)
    outof = np.empty(P, np.int64)
    biases = np.empty(P, np.int64)
    node = np.empty(P, np.int64)
    dz_part = np.empty(CHUNK * A, x.dtype)
    h_part = np.empty(CHUNK * A, x.dtype)
    taken = np.empty(CHUNK * A, x.dtype)
    part = np.empty((2, CHUNK * A), x.dtype)
    while True:
        task = fetch_add(counter)
        if task >= (k1 - k0) * C:
            break
        k = k0 + task // C
        c = task % C
        p0 = N * c // C
        p1 = N * (c + 1) // C
        for lf in range(L * c // C, L * (c + 1) // C):
            for l in range(first, depth):
                span = 1 << (depth - l)
                if lf % span == 0 and starts[k, lf] == starts[k, lf + span]:
                    n = ((lf + L) >> (depth - l)) - 1
                    _zero(gw_in, gb, gw_out, k, n, n - out_shift, wants_in, wants_out)
            if starts[k, lf] == starts[k, lf + 1]:
                for j in range(width):
                    n = M + lf * width + j
                    _zero(gw_in, gb, gw_out, k, n, n - out_shift, wants_in, wants_out)
        rows[k, c] = -1
        node[:] = -1
        p = p0
        leaf = 0
        while p < p1:
            while starts[k, leaf + 1] <= p:
                leaf += 1
            for u in range(first, P):
                n = ((leaf + L) >> (depth - u)) - 1 if u < depth else M + leaf * width + u - depth
                if node[u] == n:
                    continue
                node[u] = n
                span = depth - u if u < depth else 0
                begins = starts[k, leaf >> span << span]
                ends = starts[k, ((leaf >> span) + 1) << span]
                if begins >= p0 and ends <= p1:
                    into[u] = gw_in.ctypes.data + (k * gw_in.shape[1] + n) * step
                    outof[u] = gw_out.ctypes.data + (k * gw_out.shape[1] + n - out_shift) * step
                    biases[u] = -1
                    _zero(gw_in, gb, gw_out, k, n, n - out_shift, wants_in, wants_out)
                else:
                    side = 0 if begins < p0 else 1
                    rows[k, c, side, u] = n
                    partial[k, c, side, u] = 0
                    at = partial[k, c, side, u].ctypes.data
                    into[u] = at
                    outof[u] = at + (d + 1) * x.itemsize
                    biases[u] = side
            end = min(p1, starts[k, leaf + 1])
            while p < end:
                count = min(CHUNK, end - p)
                for i in range(count):
                    t = order[k, p + i]
                    xs[i] = x.ctypes.data + t * step
                    gs[i] = gy.ctypes.data + t * step
                    for u in range(A):
                        dz_part[i * A + u] = dz[t, k, first + u]
                        taken[i * A + u] = z[t, k, first + u]
                for i in range(p + count, min(p + count + 8, p1)):
                    if wants_in:
                        prefetch(x.ctypes.data + order[k, i] * step, step)
                    if wants_out:
                        prefetch(gy.ctypes.data + order[k, i] * step, step)
                if wants_in:
                    sums(xs, 0, count, dz_part, 1, A, into[first:], A, d, True)
                    for u in range(A):
                        total = x.dtype.type(0)
                        for i in range(count):
                            total += dz_part[i * A + u]
                        if biases[first + u] < 0:
                            gb[k, node[first + u]] += total
                        else:
                            partial[k, c, biases[first + u], first + u, 0, d] += total
                if wants_out:
                    activate(taken, count, A, width, acts, False, h_part, part)
                    sums(gs, 0, count, h_part, 1, A, outof[first:], A, d, True)
                p += count


@jit
def _zero(gw_in, gb, gw_out, k, row_in, row_out, wants_in, wants_out):
    if wants_in:
        gw_in[k, row_in] = 0
        gb[k, row_in] = 0
    if wants_out:
        gw_out[k, row_out] = 0


@jit
def join(counter, gw_in, gb, gw_out, partial, rows, wants_in, wants_out, k0, k1, depth, width):
    """Add the partial rows of `gradients` in the order of their tokens. A task is a tree."""
    C, P = rows.shape[1], rows.shape[3]
    d = gw_out.shape[2]
    out_shift = 0 if gw_out.shape[1] > (width << depth) else (1 << depth) - 1
    while True:
        k = k0 + fetch_add(counter)
        if k >= k1:
            break
        for u in range(P):
            last = -1
            for c in range(C):
                for side in range(2):
                    n = rows[k, c, side, u]
                    if n < 0:
                        continue
                    if n != last:
                        _zero(gw_in, gb, gw_out, k, n, n - out_shift, wants_in, wants_out)
                    last = n
                    if wants_in:
                        for j in range(d):
                            gw_in[k, n, j] += partial[k, c, side, u, 0, j]
                        gb[k, n] += partial[k, c, side, u, 0, d]
                    if wants_out:
                        for j in range(d):
                            gw_out[k, n - out_shift, j] += partial[k, c, side, u, 1, j]
