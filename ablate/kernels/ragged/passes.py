"""Passes over ragged (pruned) trees, compiled by Numba: the complete tree's, with tables instead of heap arithmetic.

A token's arithmetic depends on its path and on the tokens that share it, not on what else is in the trees: where pruning
removed only what no token reached, outputs stay equal bit for bit (to `cpu.passes` they are equal up to rounding).

A reference r is a node if r >= 0 and the leaf ~r otherwise; leaves are numbered left to right, tree after tree.
`branches` [n, 2] holds a node's left and right reference (the same one twice: always taken, the node decides nothing),
`split` [n] the first leaf of its right side, `spans` [n, 2] the leaves under it, `paths` [leaves, D] the nodes above a
leaf from the root down, `lengths` [leaves] how many. A row of w_in is a node, or n + leaf·W + j; responses have D + W
columns.
"""

# Numba compiles these functions; it does not read annotations, and mypy sees its decorators as untyped.
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, untyped-decorator, var-annotated"
from __future__ import annotations

import numpy as np

from ablate.kernels.cpu.jit import jit
from ablate.kernels.cpu.segments import CHUNK, activate, products, sums
from ablate.kernels.cpu.vector import dots11, dots41, dots81, fetch_add


@jit
def _by_leaf(leaves, k, t0, t1, first, starts, order):
    """Stable counting sort of tokens t0..t1 by their leaf in tree k: order, and where each of its leaves starts."""
    L = starts.shape[0] - 1
    starts[:] = 0
    for t in range(t0, t1):
        starts[leaves[t, k] - first + 1] += 1
    for l in range(L):
        starts[l + 1] += starts[l]
    for t in range(t0, t1):
        l = leaves[t, k] - first
        order[starts[l]] = t
        starts[l] += 1
    for l in range(L, 0, -1):
        starts[l] = starts[l - 1]
    starts[0] = 0


@jit
def _path(leaf, paths, length, nodes, width, base, step, ws):
    """Addresses of a leaf's path: `length` of its nodes, then its units; `nodes` rows come before the first leaf's."""
    for l in range(length):
        ws[l] = base + paths[leaf, l] * step
    for j in range(width):
        ws[length + j] = base + (nodes + leaf * width + j) * step


@jit
def down(
    counter, x, w_in, b, has_bias, thresholds, roots, branches, split, leaves, given, z, units, all_nodes, depth, width,
    block,
):  # fmt: skip
    """Route, or follow given leaves: z[n, k, :] on the path. A task is (block of tokens, tree).

    `units`: leaf units are wanted; `all_nodes`: so are nodes that decide nothing (those that decide always are, unless
    leaves are given and `all_nodes` is off).
    """
    N, d = x.shape
    K = roots.shape[0]
    nodes = branches.shape[0]
    step = d * x.itemsize
    blocks = (N + block - 1) // block
    order = np.empty(block, np.int64)
    rights = np.empty(block, np.int64)
    xs = np.empty(block, np.int64)
    ws = np.empty(max(width, 1), np.int64)
    scores = np.empty(max(block, CHUNK * width), z.dtype)
    scratch = np.empty(16, z.dtype)
    stack = np.empty((depth + 2, 4), np.int64)
    base = w_in.ctypes.data
    while True:
        task = fetch_add(counter)
        if task >= blocks * K:
            break
        k = task % K
        t0 = task // K * block
        t1 = min(N, t0 + block)
        for i in range(t1 - t0):
            order[i] = t0 + i
        top = 1
        stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = roots[k], 0, 0, t1 - t0
        while top > 0:
            top -= 1
            n, level, p0, p1 = stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3]
            size = p1 - p0
            if n >= 0:
                decides = branches[n, 0] != branches[n, 1]
                if all_nodes or (decides and not given):
                    for i in range(size):
                        xs[i] = x.ctypes.data + order[p0 + i] * step
                    ws[0] = base + n * step
                    i = 0
                    while i + 8 <= size:
                        dots81(xs, i, ws, 0, d, scores, i)
                        i += 8
                    if i + 4 <= size:
                        dots41(xs, i, ws, 0, d, scores, i)
                        i += 4
                    while i < size:
                        dots11(xs, i, ws, 0, d, scores, i)
                        i += 1
                    bias = b[n] if has_bias else z.dtype.type(0)
                    for i in range(size):
                        scores[i] += bias
                        z[order[p0 + i], k, level] = scores[i]
                if not decides:
                    stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = branches[n, 0], level + 1, p0, p1
                    top += 1
                    continue
                limit = thresholds[n]
                kept, moved = p0, 0
                for i in range(size):
                    t = order[p0 + i]
                    right = leaves[t, k] >= split[n] if given else scores[i] > limit
                    if right:
                        rights[moved] = t
                        moved += 1
                    else:
                        order[kept] = t
                        kept += 1
                for i in range(moved):
                    order[kept + i] = rights[i]
                if kept < p1:
                    stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = branches[n, 1], level + 1, kept, p1
                    top += 1
                if kept > p0:
                    stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = branches[n, 0], level + 1, p0, kept
                    top += 1
            else:
                leaf = ~n
                if not given:
                    for i in range(p0, p1):
                        leaves[order[i], k] = leaf
                if units:
                    for i in range(size):
                        xs[i] = x.ctypes.data + order[p0 + i] * step
                    first = nodes + leaf * width
                    for j in range(width):
                        ws[j] = base + (first + j) * step
                    for s0 in range(0, size, CHUNK):
                        count = min(CHUNK, size - s0)
                        products(xs, s0, count, ws, width, d, scores, scratch)
                        for i in range(count):
                            t = order[p0 + s0 + i]
                            for j in range(width):
                                bias = b[first + j] if has_bias else z.dtype.type(0)
                                z[t, k, depth + j] = scores[i * width + j] + bias


@jit
def up(counter, z, acts, w_out, out_nodes, leaves, y, trees, paths, lengths, k0, k1, depth, width, block):
    """y[n] = sum over trees k0..k1 and the path's units with outputs of phi(z) · w_out. A task is a block of tokens."""
    N, d = y.shape
    step = d * y.itemsize
    blocks = (N + block - 1) // block
    order = np.empty(block, np.int64)
    starts = np.empty(lengths.shape[0] + 1, np.int64)
    ws = np.empty(depth + width, np.int64)
    ys = np.empty(CHUNK, np.int64)
    coef = np.empty(CHUNK * (depth + width), y.dtype)
    taken = np.empty(CHUNK * (depth + width), y.dtype)
    part = np.empty((2, CHUNK * (depth + width)), y.dtype)
    while True:
        task = fetch_add(counter)
        if task >= blocks:
            break
        t0 = task * block
        t1 = min(N, t0 + block)
        for k in range(k0, k1):
            first = trees[k]
            own = starts[: trees[k + 1] - first + 1]
            _by_leaf(leaves, k, t0, t1, first, own, order)
            p = 0
            while p < t1 - t0:
                leaf = leaves[order[p], k]
                end = own[leaf - first + 1]
                length = lengths[leaf] if out_nodes > 0 else 0
                A = length + width
                _path(leaf, paths, length, out_nodes, width, w_out.ctypes.data, step, ws)
                while p < end:
                    count = min(CHUNK, end - p)
                    for i in range(count):
                        t = order[p + i]
                        ys[i] = y.ctypes.data + t * step
                        for u in range(length):
                            taken[i * A + u] = z[t, k, u]
                        for u in range(width):
                            taken[i * A + length + u] = z[t, k, depth + u]
                    activate(taken, count, A, width, acts, False, coef, part)
                    sums(ws, 0, A, coef, A, 1, ys, count, d, k > k0)
                    p += count


@jit
def back(
    counter, gy, w_out, out_nodes, w_in, z, acts, leaves, dz, gx, wants_gx, trees, paths, lengths, nodes, k0, k1, depth,
    width, block,
):  # fmt: skip
    """dz[n, k, :] = phi'(z) · <gy, w_out> on the path, and gx[n] += sum dz · w_in. A task is a block of tokens."""
    N, d = gy.shape
    step = d * gy.itemsize
    blocks = (N + block - 1) // block
    order = np.empty(block, np.int64)
    starts = np.empty(lengths.shape[0] + 1, np.int64)
    ws = np.empty(depth + width, np.int64)
    gs = np.empty(CHUNK, np.int64)
    xs = np.empty(CHUNK, np.int64)
    coef = np.empty(CHUNK * (depth + width), gy.dtype)
    taken = np.empty(CHUNK * (depth + width), gy.dtype)
    slopes = np.empty(CHUNK * (depth + width), gy.dtype)
    part = np.empty((2, CHUNK * (depth + width)), gy.dtype)
    scratch = np.empty(16, gy.dtype)
    while True:
        task = fetch_add(counter)
        if task >= blocks:
            break
        t0 = task * block
        t1 = min(N, t0 + block)
        for k in range(k0, k1):
            first = trees[k]
            own = starts[: trees[k + 1] - first + 1]
            _by_leaf(leaves, k, t0, t1, first, own, order)
            p = 0
            while p < t1 - t0:
                leaf = leaves[order[p], k]
                end = own[leaf - first + 1]
                length = lengths[leaf] if out_nodes > 0 else 0
                A = length + width
                while p < end:
                    count = min(CHUNK, end - p)
                    for i in range(count):
                        gs[i] = gy.ctypes.data + order[p + i] * step
                        xs[i] = gx.ctypes.data + order[p + i] * step
                    _path(leaf, paths, length, out_nodes, width, w_out.ctypes.data, step, ws)
                    products(gs, 0, count, ws, A, d, coef, scratch)
                    for i in range(count):
                        t = order[p + i]
                        for u in range(A):
                            taken[i * A + u] = z[t, k, u if u < length else depth + u - length]
                    activate(taken, count, A, width, acts, True, slopes, part)
                    for i in range(count):
                        t = order[p + i]
                        for u in range(A):
                            column = u if u < length else depth + u - length
                            g = coef[i * A + u] * slopes[i * A + u]
                            coef[i * A + u] = g
                            dz[t, k, column] = g
                    if wants_gx:
                        _path(leaf, paths, length, nodes, width, w_in.ctypes.data, step, ws)
                        sums(ws, 0, A, coef, A, 1, xs, count, d, True)
                    p += count


@jit
def sort(counter, leaves, trees, k0, k1, starts, order):
    """Tokens by leaf in each tree: order [K, N] and starts [leaves + K], a tree's at trees[k] + k. A task is a tree."""
    while True:
        k = k0 + fetch_add(counter)
        if k >= k1:
            break
        _by_leaf(leaves, k, 0, leaves.shape[0], trees[k], starts[trees[k] + k : trees[k + 1] + k + 1], order[k])


@jit
def gradients(
    counter, x, gy, z, acts, dz, order, starts, tree_of, node_levels, spans, gw_in, gb, gw_out, out_nodes, wants_in,
    wants_out, depth, width,
):  # fmt: skip
    """gw_in, gb and gw_out (zeroed by the caller) as sums over each row's segment of sorted tokens.

    A task is a position, the nodes (if they have outputs) first, then the leaves; it alone writes its rows. `tree_of`
    [n + leaves] is each position's tree, or -1 for those not asked for; `node_levels` [n] a node's place on its path.
    """
    d = x.shape[1]
    nodes = spans.shape[0]
    step = d * x.itemsize
    xs = np.empty(CHUNK, np.int64)
    gs = np.empty(CHUNK, np.int64)
    into = np.empty(max(1, width), np.int64)
    outof = np.empty(max(1, width), np.int64)
    dz_part = np.empty(CHUNK * width, x.dtype)
    h_part = np.empty(CHUNK * width, x.dtype)
    taken = np.empty(CHUNK * width, x.dtype)
    part = np.empty((2, CHUNK * width), x.dtype)
    while True:
        task = fetch_add(counter)
        if task >= tree_of.shape[0]:
            break
        k = tree_of[task]
        if k < 0 or (task < nodes and out_nodes == 0):
            continue
        if task < nodes:
            first, last, rows, row, column = spans[task, 0], spans[task, 1], 1, task, node_levels[task]
        else:
            first = task - nodes
            last, rows, row, column = first + 1, width, nodes + first * width, depth
        for j in range(rows):
            into[j] = gw_in.ctypes.data + (row + j) * step
            outof[j] = gw_out.ctypes.data + (row + j - nodes + out_nodes) * step
        p = starts[first + k]
        end = starts[last + k]
        while p < end:
            count = min(CHUNK, end - p)
            for i in range(count):
                t = order[k, p + i]
                xs[i] = x.ctypes.data + t * step
                gs[i] = gy.ctypes.data + t * step
                for j in range(rows):
                    dz_part[i * rows + j] = dz[t, k, column + j]
                    taken[i * rows + j] = z[t, k, column + j]
            if wants_in:
                sums(xs, 0, count, dz_part, 1, rows, into, rows, d, True)
                for j in range(rows):
                    total = x.dtype.type(0)
                    for i in range(count):
                        total += dz_part[i * rows + j]
                    gb[row + j] += total
            if wants_out:
                # A node is one column without leaf units behind it.
                activate(taken, count, rows, 0 if task < nodes else width, acts, False, h_part, part)
                sums(gs, 0, count, h_part, 1, rows, outof, rows, d, True)
            p += count
