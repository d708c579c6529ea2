"""What a backend is, and the backends there are.

To add one: write a module that has the functions of `Backend`, and give it an entry in `BACKENDS`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from ablate.kernels.spec import TreeSpec

if TYPE_CHECKING:
    from ablate.kernels.ragged.shape import Shape

Forward = tuple[Tensor, Tensor, Tensor]
"""y [N, d]; leaves int32 [N, K]; responses [N, K, D + W], float32 (float64 for float64 inputs)."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, w_in, b and w_out, each in the shape of its tensor; None where it is not needed."""


class Backend(Protocol):
    """The functions of a backend module. Tensors are flat and on one device: x [N, d], weights as in `op`."""

    def forward(
        self,
        x: Tensor,
        w_in: Tensor,
        b: Tensor | None,
        w_out: Tensor,
        thresholds: Tensor | None,
        leaves: Tensor | None,
        spec: TreeSpec,
    ) -> Forward:
        """Compute the layer; follow `leaves` [N, K] where they are given, and route by `thresholds` [K, M] otherwise."""

    def route(
        self, x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor | None, spec: TreeSpec
    ) -> tuple[Tensor, Tensor]:
        """Return leaves int32 [N, K] and node responses on the path [N, K, D]; `w_in` may hold node rows alone."""

    def backward(
        self,
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
        """Return the gradients for gy [N, d] from what `forward` returned; `needs` says of which of the four."""

    def decoder(
        self,
        w_in: Tensor,
        b: Tensor | None,
        w_out: Tensor,
        thresholds: Tensor | None,
        router_w: Tensor | None,
        router_b: Tensor | None,
        spec: TreeSpec,
    ) -> Callable[[Tensor], Tensor] | None:
        """Return a function y [N, d] of x [N, d] that is fast for a few tokens; None where the backend has none.

        The function reads the weights without copying them. `router_w` [K, M, d] and `router_b` [K, M] decide instead
        of the nodes' own rows where they are given.
        """

    def version(self) -> str:
        """Return what decided how shapes are computed (a shipped table, say), for the record of a trial."""


class RaggedBackend(Protocol):
    """The same for ragged trees; leaves and rows are numbered through all trees, see `ragged.shape`."""

    def forward(
        self,
        x: Tensor,
        w_in: Tensor,
        b: Tensor | None,
        w_out: Tensor,
        thresholds: Tensor,
        leaves: Tensor | None,
        shape: Shape,
        spec: TreeSpec,
    ) -> Forward:
        """Compute the layer; follow `leaves` [N, K] where they are given."""

    def route(
        self, x: Tensor, w_in: Tensor, b: Tensor | None, thresholds: Tensor, shape: Shape, spec: TreeSpec
    ) -> tuple[Tensor, Tensor]:
        """Return leaves int32 [N, K] and the responses [N, K, D] of the nodes that decided."""

    def backward(
        self,
        gy: Tensor,
        x: Tensor,
        w_in: Tensor,
        b: Tensor | None,
        w_out: Tensor,
        leaves: Tensor,
        responses: Tensor,
        shape: Shape,
        spec: TreeSpec,
        needs: Sequence[bool],
    ) -> Gradients:
        """Return the gradients for gy [N, d] from what `forward` returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Where a backend is and what it computes; its module is imported on first use."""

    module: str
    device: str
    dtypes: frozenset[torch.dtype]
    ragged: str | None = None
    """A module with the functions of `RaggedBackend`; without one, ragged trees are computed by plain PyTorch."""

    def supports(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether `auto` means this backend for tensors of a device and dtype."""
        return device.type == self.device and dtype in self.dtypes


REFERENCE = "reference"
"""The definition in plain PyTorch, with gradients by autograd; for everything that no backend supports."""
BACKENDS: dict[str, Entry] = {
    "cpu": Entry(
        module="ablate.kernels.cpu.backend",
        ragged="ablate.kernels.ragged.cpu",
        device="cpu",
        dtypes=frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16}),
    ),
    "triton": Entry(
        module="ablate.kernels.triton.backend",
        device="cuda",
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    ),
}


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that `backend` means for tensors of a device and dtype: itself, unless it is `auto`.

    Raises ValueError for a name that is neither `auto`, `reference` nor one of `BACKENDS`.
    """
    if backend == "auto":
        return next((name for name, entry in BACKENDS.items() if entry.supports(device, dtype)), REFERENCE)
    if backend != REFERENCE and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: auto, {REFERENCE}, {', '.join(BACKENDS)} are allowed")
    return backend


@functools.cache
def load(name: str) -> Backend:
    """Return the module of one of `BACKENDS`."""
    return cast(Backend, importlib.import_module(BACKENDS[name].module))


def has_ragged(name: str) -> bool:
    """Return whether a backend has kernels for ragged trees; the reference has none."""
    return name in BACKENDS and BACKENDS[name].ragged is not None


@functools.cache
def load_ragged(name: str) -> RaggedBackend:
    """Return a backend's module for ragged trees; raises ValueError for one without."""
    module = BACKENDS[name].ragged
    if module is None:
        raise ValueError(f"backend {name!r} has no kernels for ragged trees")
    return cast(RaggedBackend, importlib.import_module(module))
