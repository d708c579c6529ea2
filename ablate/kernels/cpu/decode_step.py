"""The tree layer on CPUs for a few tokens at a time, as in generation: one compiled call, no sorting, one thread.

Cost is K(D + W) rows of d a token, plus about as much again for the outputs. A single token's work is some
microseconds, less than waking a second thread costs.
"""

# Numba compiles these functions; it does not read annotations, and mypy sees its decorators as untyped.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ablate.kernels.cpu.jit import jit
from ablate.kernels.cpu.pointwise import code, phi
from ablate.kernels.cpu.vector import combine1, dots11
from ablate.kernels.spec import TreeSpec

_PLACEMENTS = {"unit": 0, "tree": 1, "sum": 2}


@jit
def step(
    x, w_in, b, has_bias, thresholds, has_thresholds, router_w, router_b, has_router, w_out, y, scratch, depth, width,
    placement, acts,
):  # fmt: skip
    """y [N, d] of x [N, d], token by token and tree by tree; acts [2, 3] are the nodes' and the leaf units' phi.

    `scratch` [d] is used by the placement `tree`.
    """
    N, d = x.shape
    K = w_in.shape[0]
    M = (1 << depth) - 1
    P = depth + width
    has_nodes = w_out.shape[1] > (width << depth)
    first = 0 if has_nodes else depth
    shift = 0 if has_nodes else M
    row = d * x.itemsize
    xs = np.empty(1, np.int64)
    ys = np.empty(1, np.int64)
    ins = np.empty(P, np.int64)
    outs = np.empty(P, np.int64)
    decides = np.empty(1, np.int64)
    z = np.empty(P, x.dtype)
    score = np.empty(1, x.dtype)
    for t in range(N):
        xs[0] = x.ctypes.data + t * row
        for k in range(K):
            base = w_in.ctypes.data + k * w_in.shape[1] * row
            out_base = w_out.ctypes.data + k * w_out.shape[1] * row
            n = 0
            for l in range(depth):
                if has_nodes or not has_router:
                    ins[l] = base + n * row
                    dots11(xs, 0, ins, l, d, z, l)
                    if has_bias:
                        z[l] += b[k, n]
                if has_router:
                    decides[0] = router_w.ctypes.data + (k * M + n) * row
                    dots11(xs, 0, decides, 0, d, score, 0)
                    if has_bias:
                        score[0] += router_b[k, n]
                else:
                    score[0] = z[l]
                outs[l] = out_base + n * row
                limit = thresholds[k, n] if has_thresholds else x.dtype.type(0)
                n = 2 * n + 1 + (1 if score[0] > limit else 0)
            for j in range(width):
                u = M + (n - M) * width + j
                ins[depth + j] = base + u * row
                outs[depth + j] = out_base + (u - shift) * row
                dots11(xs, 0, ins, depth + j, d, z, depth + j)
                if has_bias:
                    z[depth + j] += b[k, u]
            if placement == 0:
                if has_nodes:
                    phi(z, depth, acts[0], z)
                phi(z[depth:], width, acts[1], z[depth:])
            ys[0] = scratch.ctypes.data if placement == 1 else y.ctypes.data + t * row
            combine1(outs, first, P - first, z, first, 0, 1, ys, 0, d, placement != 1 and k > 0)
            if placement == 1:
                phi(scratch, d, acts[1], scratch)
                for i in range(d):
                    y[t, i] = scratch[i] if k == 0 else y[t, i] + scratch[i]
        if placement == 2:
            phi(y[t], d, acts[1], y[t])


def prepare(
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    router_w: Tensor | None,
    router_b: Tensor | None,
    spec: TreeSpec,
) -> Callable[[Tensor], Tensor]:
    """A function y [N, d] of x [N, d] over these weights (float32 or float64, on the CPU), which it does not copy.

    `thresholds` [K, M]; `router_w` [K, M, d] and `router_b` [K, M] decide in the nodes' stead where given.
    """
    dtype = w_in.dtype

    def plain(tensor: Tensor | None, dimensions: int) -> np.ndarray:
        kept = torch.empty((0,) * dimensions, dtype=dtype) if tensor is None else tensor
        array: np.ndarray = kept.detach().to(dtype).contiguous().numpy()
        return array

    # Without levels nothing is decided, so no threshold and no router is read.
    decided = spec.depth > 0
    limits = thresholds if decided else None
    routed = router_w is not None and decided
    weights = (
        plain(w_in, 3), plain(b, 2), b is not None, plain(limits, 2), limits is not None,
        plain(router_w, 3), plain(router_b, 2), routed, plain(w_out, 3),
    )  # fmt: skip
    node = code(spec.activation, spec.node_mirror, spec.node_gain)
    acts = np.array([node, code(spec.activation, spec.mirror, spec.leaf_gain)])
    placement = _PLACEMENTS[spec.placement]
    scratch = np.empty(weights[0].shape[2], weights[0].dtype)
    depth, width = spec.depth, spec.leaf_width

    def run(x: Tensor) -> Tensor:
        x = x.detach().to(dtype).contiguous()
        y = torch.empty_like(x)
        step(x.numpy(), *weights, y.numpy(), scratch, depth, width, placement, acts)
        return y

    return run
