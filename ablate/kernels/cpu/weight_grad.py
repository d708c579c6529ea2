"""The CPU tree layer's gradients of weights: tokens sorted by leaf, sums over each row's tokens. Compiled by Numba.

Tasks are drawn and written as in `passes`.
"""

# Numba compiles these functions; it does not read annotations, and mypy sees its decorators as untyped.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, untyped-decorator, var-annotated"
from __future__ import annotations

import numpy as np

from ablate.kernels.cpu.jit import jit
from ablate.kernels.cpu.segments import CHUNK, activate, by_leaf, sums
from ablate.kernels.cpu.vector import fetch_add, prefetch


@jit
def sort(counter, leaves, k0, k1, starts, order):
    """Tokens by leaf, for each tree: order [K, N] and starts [K, L + 1]. A task is a tree."""
    while True:
        k = k0 + fetch_add(counter)
        if k >= k1:
            break
        by_leaf(leaves, k, 0, leaves.shape[0], starts[k], order[k])


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
