"""The tree layer on CPUs: host side. Cost follows the units on the path, never all units.

Time O(N·K·(D + W)·d), memory beyond inputs and results O(N·K·(D + W) + N·d). float32 and float64; bfloat16 is computed
in float32 and cast back. Where leaves are given, node responses are computed too, also with `node_output` off, as the
reference does. Threads are torch's (`torch.get_num_threads`); results are bitwise the same for any number of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablate.kernels import cpu_kernels as kernels
from ablate.kernels.activations import phi, phi_slope
from ablate.kernels.spec import TreeSpec
from ablate.kernels.threads import run_on_threads

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    leaves: Tensor | None,
    spec: TreeSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, d] in x's dtype, leaves int32 [N, K], responses [N, K, D + W] in float32 (float64 for float64)."""
    dtype = x.dtype
    x, w_in, b, w_out = _plain(x), _plain(w_in), _plain(b), _plain(w_out)
    z, leaves = _down(x, w_in, b, thresholds, leaves, spec, spec.path)
    n, d = x.shape
    if spec.placement == "unit":
        y = _up(_hidden(z, spec), w_out, leaves, spec, 0, spec.trees)
    elif spec.placement == "sum":
        y = phi(_up(z, w_out, leaves, spec, 0, spec.trees), spec.activation, spec.mirror, spec.leaf_gain)
    else:
        y = x.new_zeros(n, d)
        for k in range(spec.trees):
            y += phi(_up(z, w_out, leaves, spec, k, k + 1), spec.activation, spec.mirror, spec.leaf_gain)
    return y.to(dtype), leaves, z


def route(
    x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor | None, spec: TreeSpec
) -> tuple[Tensor, Tensor]:
    """Leaves int32 [N, K] and node responses on the path [N, K, D]; outputs are not computed."""
    z, leaves = _down(_plain(x), _plain(w_in), _plain(b), thresholds, None, spec, spec.depth)
    return leaves, z


def backward(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    leaves: Tensor,
    responses: Tensor,
    spec: TreeSpec,
    needs: tuple[bool, ...],
) -> Grads:
    """Gradients of x, w_in, b and w_out for the path that was taken, None where `needs` is False.

    For the placements `tree` and `sum` the outputs' sums are computed again, one [N, d] at a time.
    """
    dtype = x.dtype
    needs_x, needs_in, needs_b, needs_out = needs
    x, w_in, b, w_out, gy = _plain(x), _plain(w_in), _plain(b), _plain(w_out), _plain(gy)
    leaves = leaves.contiguous()
    gx = torch.zeros_like(x) if needs_x else x.new_empty(0, x.shape[1])
    gw_in = torch.empty_like(w_in) if needs_in or needs_b else w_in.new_empty(0, 0, x.shape[1])
    gb = w_in.new_empty(w_in.shape[:2]) if needs_in or needs_b else w_in.new_empty(0, 0)
    gw_out = torch.empty_like(w_out) if needs_out else w_out.new_empty(0, *w_out.shape[1:])
    if not spec.node_output and gw_in.numel():
        gw_in[:, : spec.nodes] = 0
        gb[:, : spec.nodes] = 0
    results = (gx, gw_in, gb, gw_out)
    if spec.placement == "unit":
        h, slopes = _hidden(responses, spec), _slopes(responses, spec)
        _chain(gy, x, w_in, w_out, leaves, h, slopes, results, needs, spec, 0, spec.trees)
    else:
        ranges = [(0, spec.trees)] if spec.placement == "sum" else [(k, k + 1) for k in range(spec.trees)]
        ones = torch.ones_like(responses)
        for k0, k1 in ranges:
            summed = _up(responses, w_out, leaves, spec, k0, k1)
            gs = phi_slope(summed, spec.activation, spec.mirror, spec.leaf_gain).mul_(gy)
            _chain(gs, x, w_in, w_out, leaves, responses, ones, results, needs, spec, k0, k1)
    wanted = (gx, gw_in, gb if b is not None else None, gw_out)
    return tuple(  # type: ignore[return-value]
        g.to(dtype) if g is not None and n else None for g, n in zip(wanted, needs, strict=True)
    )


def _chain(
    gy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    leaves: Tensor,
    h: Tensor,
    slopes: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    needs: tuple[bool, ...],
    spec: TreeSpec,
    k0: int,
    k1: int,
) -> None:
    """Write the gradients of trees k0..k1 into `results` (gx is added to), where y = sum h(z) w_out exactly."""
    gx, gw_in, gb, gw_out = results
    needs_x, needs_out = needs[0], needs[3]
    needs_in = needs[1] or needs[2]
    tail = (k0, k1, spec.depth, spec.leaf_width)
    dz = torch.empty_like(slopes)
    if needs_x or needs_in:
        _launch(kernels.back, gy, w_out, w_in, slopes, leaves, dz, gx, True, needs_x, *tail, _block(gy.shape[0], spec))
    if needs_in or needs_out:
        n, d = x.shape
        trees, chunks = spec.trees, max(1, min(16 // (k1 - k0), n // 128))
        starts = np.empty((trees, spec.leaves + 1), np.int64)
        order = np.empty((trees, n), np.int64)
        partial = x.new_empty(trees, chunks, 2, spec.path, 2, d + 1)
        rows = np.empty((trees, chunks, 2, spec.path), np.int64)
        wants = (needs_in, needs_out)
        _launch(kernels.sort, leaves, k0, k1, starts, order)
        _launch(kernels.gradients, x, gy, h, dz, order, starts, gw_in, gb, True, gw_out, partial, rows, *wants, *tail)
        _launch(kernels.join, gw_in, gb, True, gw_out, partial, rows, *wants, *tail)


def _down(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    thresholds: Tensor | None,
    leaves: Tensor | None,
    spec: TreeSpec,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Responses [N, K, width], width D or D + W, and leaves int32 [N, K]."""
    n = x.shape[0]
    given = leaves is not None
    taken = x.new_empty((n, spec.trees), dtype=torch.int32) if leaves is None else leaves.int().contiguous()
    z = x.new_empty(n, spec.trees, width)
    none = x.new_empty(0, 0)
    t = none if thresholds is None else thresholds.to(x.dtype).contiguous()
    _launch(
        kernels.down, x, w_in, none if b is None else b, b is not None, t, thresholds is not None, taken, given, z,
        spec.depth, spec.leaf_width, _block(n, spec),
    )  # fmt: skip
    return z, taken


def _up(h: Tensor, w_out: Tensor, leaves: Tensor, spec: TreeSpec, k0: int, k1: int) -> Tensor:
    """sum_u h_u w_out[u] over the paths in trees k0..k1: [N, d]."""
    y = h.new_empty(h.shape[0], w_out.shape[2])
    _launch(kernels.up, h, w_out, leaves, y, k0, k1, spec.depth, spec.leaf_width, _block(h.shape[0], spec))
    return y


def _block(tokens: int, spec: TreeSpec) -> int:
    return max(1, min(2048, tokens))


def _launch(kernel: Any, *arguments: Any) -> None:
    """Run a kernel on torch's threads; tensors go in as NumPy views."""
    views = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    counter = np.zeros(1, np.int64)
    run_on_threads(lambda: kernel(counter, *views), torch.get_num_threads())


def _plain(t: Any) -> Any:
    """A contiguous tensor in the dtype computed in: float64 stays, anything else becomes float32."""
    if t is None:
        return None
    return t.detach().to(torch.float64 if t.dtype == torch.float64 else torch.float32).contiguous()


def _halves(z: Tensor, spec: TreeSpec, function: Callable[..., Tensor]) -> Tensor:
    """phi or its slope: nodes with the nodes' mirror and gain, leaf units with theirs."""
    leaf = (spec.activation, spec.mirror, spec.leaf_gain)
    node = (spec.activation, spec.node_mirror, spec.node_gain)
    if leaf == node or spec.depth == 0:
        return function(z, *leaf)
    return torch.cat([function(z[..., : spec.depth], *node), function(z[..., spec.depth :], *leaf)], dim=-1)


def _hidden(z: Tensor, spec: TreeSpec) -> Tensor:
    return _halves(z, spec, phi)


def _slopes(z: Tensor, spec: TreeSpec) -> Tensor:
    return _halves(z, spec, phi_slope)
