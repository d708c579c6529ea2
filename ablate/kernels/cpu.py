"""The tree layer on CPUs: host side. Cost follows the units on the path, never all units.

Time O(N·K·(D + W)·d), memory beyond inputs and results O(N·K·(D + W) + N·d). float32 and float64; bfloat16 is computed
in float32 and cast back. Where leaves are given, node responses are computed too, also with `node_output` off, as the
reference does. Threads are torch's (`torch.get_num_threads`); results are bitwise the same for any number of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ablate.kernels import cpu_kernels as kernels
from ablate.kernels.activations import phi, phi_slope
from ablate.kernels.cpu_pointwise import CODES, code
from ablate.kernels.spec import TreeSpec
from ablate.kernels.threads import advise_huge_pages, run_on_threads

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
        y = _up(z, w_out, leaves, spec, 0, spec.trees)
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
    gx = _empty(*x.shape, like=x) if needs_x else x.new_empty(0, x.shape[1])
    gw_in = torch.empty_like(w_in) if needs_in or needs_b else w_in.new_empty(0, 0, x.shape[1])
    gb = w_in.new_empty(w_in.shape[:2]) if needs_in or needs_b else w_in.new_empty(0, 0)
    gw_out = torch.empty_like(w_out) if needs_out else w_out.new_empty(0, *w_out.shape[1:])
    if not spec.node_output and gw_in.numel():
        gw_in[:, : spec.nodes] = 0
        gb[:, : spec.nodes] = 0
    results = (gx, gw_in, gb, gw_out)
    if spec.placement == "unit":
        _chain(gy, x, w_in, w_out, leaves, responses, results, needs, spec, 0, spec.trees)
    else:
        for k0, k1 in [(0, spec.trees)] if spec.placement == "sum" else [(k, k + 1) for k in range(spec.trees)]:
            summed = _up(responses, w_out, leaves, spec, k0, k1)
            gs = phi_slope(summed, spec.activation, spec.mirror, spec.leaf_gain).mul_(gy)
            _chain(gs, x, w_in, w_out, leaves, responses, results, needs, spec, k0, k1)
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
    z: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    needs: tuple[bool, ...],
    spec: TreeSpec,
    k0: int,
    k1: int,
) -> None:
    """Write the gradients of trees k0..k1 into `results` (gx is added to from tree 1 on).

    `gy` is the gradient of what the units' outputs are added up to.
    """
    gx, gw_in, gb, gw_out = results
    needs_x, needs_out = needs[0], needs[3]
    needs_in = needs[1] or needs[2]
    tail = (k0, k1, spec.depth, spec.leaf_width)
    dz, acts = torch.empty_like(z), _activations(spec)
    if needs_x or needs_in:
        _launch(kernels.back, gy, w_out, w_in, z, acts, leaves, dz, gx, needs_x, *tail, _block(gy.shape[0], spec))
    if needs_in or needs_out:
        n, d = x.shape
        trees, chunks = spec.trees, max(1, min(16 // (k1 - k0), n // 128))
        starts = np.empty((trees, spec.leaves + 1), np.int64)
        order = np.empty((trees, n), np.int64)
        partial = x.new_empty(trees, chunks, 2, spec.path, 2, d + 1)
        rows = np.empty((trees, chunks, 2, spec.path), np.int64)
        wants = (needs_in, needs_out)
        _launch(kernels.sort, leaves, k0, k1, starts, order)
        _launch(
            kernels.gradients, x, gy, z, acts, dz, order, starts, gw_in, gb, True, gw_out, partial, rows, *wants, *tail
        )
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


def _up(z: Tensor, w_out: Tensor, leaves: Tensor, spec: TreeSpec, k0: int, k1: int) -> Tensor:
    """What the units on the paths in trees k0..k1 add up to: [N, d]."""
    y = _empty(z.shape[0], w_out.shape[2], like=z)
    block = _block(z.shape[0], spec)
    _launch(kernels.up, z, _activations(spec), w_out, leaves, y, k0, k1, spec.depth, spec.leaf_width, block)
    return y


def _activations(spec: TreeSpec) -> NDArray[np.float64]:
    """The kernels' table [2, 3] of what units do: nodes, then leaf units; linear where phi comes after the sum."""
    if spec.placement != "unit":
        return np.array([[CODES["linear"], 0.0, 1.0]] * 2)
    node = code(spec.activation, spec.node_mirror, spec.node_gain)
    return np.array([node, code(spec.activation, spec.mirror, spec.leaf_gain)])


def _empty(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """An uninitialised [rows, columns]. Large ones ask for huge pages: faults of 4 KiB cost more than filling them."""
    t = like.new_empty(rows, columns)
    advise_huge_pages(t.data_ptr(), t.nbytes)
    return t


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
