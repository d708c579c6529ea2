"""The CPU tree layer's passes over tokens, compiled by Numba; no host logic and no threads of their own.

Every kernel draws tasks from a shared counter until none is left, so any number of threads may run it at once; a task
writes rows that no other task writes, hence results do not depend on how tasks fall to threads. Letters are those of
the shape alphabet; P = D + W responses are kept per token and tree, A of them (the last A) have outputs.
"""

# Numba compiles these functions; it does not read annotations, and mypy sees its decorators as untyped.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, untyped-decorator, var-annotated"
from __future__ import annotations

import numpy as np

from ablate.kernels.cpu.jit import jit
from ablate.kernels.cpu.segments import CHUNK, activate, path, products, same_leaf, sums
from ablate.kernels.cpu.vector import dots11, dots41, dots81, fetch_add, prefetch

NEAR_BYTES = 1 << 18
"""Rows of x that are parted together near the root: a quarter of a usual second-level cache."""


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
                count = same_leaf(leaves, k, order, p, t1) - p
                if leaves[order[k, p], k] != leaf:
                    leaf = leaves[order[k, p], k]
                    path(leaf, depth, width, M, base, step, has_nodes, ws)
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
                count = same_leaf(leaves, k, order, p, t1) - p
                for i in range(count):
                    gs[i] = gy.ctypes.data + order[k, p + i] * step
                    xs[i] = gx.ctypes.data + order[k, p + i] * step
                path(leaf, depth, width, M, out_base, step, has_nodes, ws)
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
                    path(leaf, depth, width, M, in_base, step, True, ws)
                    sums(ws, P - A, A, coef, A, 1, xs, count, d, add or k > k0)
                p += count
