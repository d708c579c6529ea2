"""What the host side of every CPU kernel needs: tensors as the kernels take them, and launches on torch's threads."""

from __future__ import annotations

import ctypes
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ablate.kernels.cpu.pointwise import LINEAR, code
from ablate.kernels.cpu.threads import advise_huge_pages, run_on_threads
from ablate.kernels.spec import TreeSpec

T = TypeVar("T", Tensor, Tensor | None)

_TYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.bool: np.dtype(np.bool_),
}
_MEMORY: Any = ctypes.c_char * (1 << 46)  # more than there is: an array over it says itself how much it uses


def plain(t: T) -> T:
    """Return a contiguous tensor in the dtype computed in: float64 stays, anything else becomes float32."""
    if t is None:
        return t
    return t.detach().to(torch.float64 if t.dtype == torch.float64 else torch.float32).contiguous()


def empty(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """Return an uninitialised [rows, columns]. Large ones ask for huge pages: faults of 4 KiB cost more than filling."""
    t = like.new_empty(rows, columns)
    advise_huge_pages(t.data_ptr(), t.nbytes)
    return t


def view(t: Tensor) -> NDArray[Any]:
    """Return a NumPy array over a tensor's memory, which the caller keeps alive, by its address.

    `Tensor.numpy`, five times as fast, marks the storage as not resizable; FSDP frees a gathered weight by resizing it.
    """
    if not t.numel():
        return np.empty(t.shape, _TYPES[t.dtype])
    strides = None if t.is_contiguous() else [step * t.element_size() for step in t.stride()]
    return np.ndarray(t.shape, _TYPES[t.dtype], _MEMORY.from_address(t.data_ptr()), 0, strides)


def activation_table(spec: TreeSpec) -> NDArray[np.float64]:
    """Return the kernels' table [2, 3] of what units do: nodes, then leaf units; linear where phi comes after the sum."""
    if spec.placement != "unit":
        return np.array([[LINEAR, 0.0, 1.0]] * 2)
    node = code(spec.activation, spec.node_mirror, spec.node_gain)
    return np.array([node, code(spec.activation, spec.mirror, spec.leaf_gain)])


def launch(kernel: Any, *arguments: Any) -> None:
    """Run a kernel on torch's threads; tensors go in as NumPy views."""
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    make = view if shared else Tensor.numpy
    views = [make(a) if isinstance(a, Tensor) else a for a in arguments]
    counter = np.zeros(1, np.int64)
    run_on_threads(lambda: kernel(counter, *views), torch.get_num_threads())
