"""The Triton backend: checks, choice of strategy and configurations, and the three functions that `op` calls.

With TRITON_INTERPRET=1 in the environment before the first import, the same code takes CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ablate.kernels.backend import Forward, Gradients
from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton import predict, tuned
from ablate.kernels.triton.passes import INTERPRETED, Pass
from ablate.kernels.triton.tiling import (
    CONFIGS,
    KERNELS,
    TILE_LEVELS,
    Config,
    DType,
    Strategy,
    Tiling,
    configs,
    make_tiling,
    shipped,
)

# Half precision has bfloat16's size and speed, so it is cut as bfloat16 is.
DTYPES: dict[torch.dtype, DType] = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What `using` can pin, for tests, measurements and tuning.

    The strategy; tiles even where they do not pay; the levels of a subtree tile (at most 6); the tokens of one partial
    sum of a weight gradient; and by kernel the place of the configuration in its shipped list.
    """

    strategy: Strategy | None = None
    always_tile: bool = False
    tile_levels: int = TILE_LEVELS
    split_tokens: int = 256
    config: tuple[tuple[str, int], ...] = ()


_policy = Policy()


def pinned() -> Policy:
    """What is pinned now."""
    return _policy


@contextlib.contextmanager
def using(**fields: Any) -> Iterator[None]:
    """Pin fields of `Policy` for every call of this process until the block ends.

    The whole process, not the thread: autograd runs backward in a thread of its own.
    """
    global _policy
    before = _policy
    _policy = replace(before, **fields)
    try:
        yield
    finally:
        _policy = before


def forward(
    x: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    leaves: Tensor | None,
    spec: TreeSpec,
) -> Forward:
    """Compute the layer; y is in x's dtype, responses are fp32.

    x, w_in and w_out are all bf16, all fp16 or all fp32, on one GPU. Given leaves must lie in [0, L); on a device that is not
    checked. Raises TypeError for other dtypes and RuntimeError for CPU tensors outside the interpreter.
    """
    d, dtype = x.shape[1], x.dtype
    x, w_in, w_out = _padded(x), _padded(w_in), _padded(w_out)
    this = _begin(x, w_in, spec, w_out)
    with this.device():
        codes, z, order = this.respond(x, w_in, b, thresholds, leaves, with_leaves=True)
        y = this.output(z, codes, order, w_out)
    return y[:, :d].to(dtype).contiguous(), codes, z


def route(
    x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor | None, spec: TreeSpec
) -> tuple[Tensor, Tensor]:
    """Leaves int32 [N, K] and node responses fp32 [N, K, D]; arguments and errors as `forward`."""
    x, w_in = _padded(x), _padded(w_in)
    this = _begin(x, w_in, spec)
    with this.device():
        return this.respond(x, w_in, b, thresholds, None, with_leaves=False)[:2]


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
) -> Gradients:
    """Return the gradients of x, w_in, b and w_out (None where `needs` says so) from gy [N, d] and what `forward` returned."""
    d = x.shape[1]
    gy, x, w_in, w_out = _padded(gy.to(x.dtype)), _padded(x), _padded(w_in), _padded(w_out)
    this = _begin(x, w_in, spec, w_out)
    with this.device():
        gx, g_in, g_b, g_out = this.gradients(gy, x, w_in, b, w_out, leaves, responses.contiguous(), needs)
    gx, g_in, g_out = (None if g is None else g[..., :d].contiguous() for g in (gx, g_in, g_out))
    return gx, g_in, g_b, g_out


def decoder(
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    thresholds: Tensor | None,
    router_w: Tensor | None,
    router_b: Tensor | None,
    spec: TreeSpec,
) -> None:
    """Return None: a few tokens go through `forward`."""


def version() -> str:
    """Return the name and a digest of the shipped table of configurations."""
    table = json.dumps(shipped(), sort_keys=True, separators=(",", ":"))
    return f"{CONFIGS} {hashlib.sha256(table.encode()).hexdigest()[:12]}"


def padded_width(d: int) -> int:
    """The width that kernels see for a model width d."""
    return d + -d % 16


def _padded(t: Tensor) -> Tensor:
    """Contiguous, with zeros up to the next multiple of 16 in the last dimension.

    Rows that are no multiple of 16 elements cannot be read in vectors; the copy costs less than reading them singly.
    """
    short = padded_width(t.shape[-1]) - t.shape[-1]
    return torch.nn.functional.pad(t, (0, short)) if short else t.contiguous()


@functools.lru_cache(maxsize=1024)
def _choose(
    spec: TreeSpec, bucket: int, d: int, dtype: DType, policy: Policy, device: str
) -> tuple[Tiling, dict[str, Config]]:
    """Tiling and configurations for token counts up to `bucket`: pinned, else tuned on this device, else predicted."""
    entry = tuned.lookup(device, spec, bucket, d, dtype)
    pinned = dict(policy.config)
    places = {name: pinned.get(name, entry.configs.get(name, 0) if entry else 0) for name in KERNELS}
    chosen = {name: configs(name, dtype)[place] for name, place in places.items()}
    if policy.strategy is not None:
        return make_tiling(spec, bucket, dtype, policy.strategy, policy.always_tile, policy.tile_levels), chosen
    strategy, why = (entry.strategy, "measured") if entry else (predict.fastest(spec, bucket, d, dtype), "predicted")
    _log.info("%s %s d %d, up to %d tokens on %s: strategy %s (%s)", spec, dtype, d, bucket, device, strategy, why)
    return make_tiling(spec, bucket, dtype, strategy, policy.always_tile, policy.tile_levels), chosen


def device_name(device: torch.device) -> str:
    """What measurements are kept under."""
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)


def forget_choices() -> None:
    """Forget earlier choices, after the table of measurements has changed."""
    _choose.cache_clear()


def _begin(x: Tensor, w_in: Tensor, spec: TreeSpec, *others: Tensor) -> Pass:
    """Check what kernels rely on and choose the tiling."""
    dtype = DTYPES.get(x.dtype)
    if dtype is None or any(w.dtype != x.dtype for w in (w_in, *others)):
        found = [str(t.dtype) for t in (x, w_in, *others)]
        raise TypeError(
            f"the triton backend takes x and weights of one dtype, bfloat16, float16 or float32, got {found}"
        )
    if x.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("the triton backend needs a GPU, or TRITON_INTERPRET=1 set before the first import")
    n, d = x.shape
    if max(n, spec.in_rows) * spec.trees >= 1 << 31:
        raise ValueError(f"{n} tokens and {spec.in_rows} rows of {spec.trees} trees exceed 32-bit indices")
    tiling, chosen = _choose(spec, tuned.bucket_of(n), d, dtype, _policy, device_name(x.device))
    return Pass(
        spec=spec,
        tokens=n,
        d=d,
        dtype=x.dtype,
        tiling=tiling,
        configs=chosen,
        tile_levels=_policy.tile_levels,
        split_tokens=_policy.split_tokens,
        where=x.device,
    )
