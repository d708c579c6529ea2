"""Finds races the interpreter cannot show: it runs programs one after another, a GPU runs them together.

Triton's interpreter is instrumented (our kernels are not): every address that a program loads or stores is recorded
with the program that did. Within one launch no two programs may store to one address, and none may load what another
stores. Addresses outside every tensor of the launch are errors too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter  # type: ignore[import-untyped]

_BUILDER = interpreter.interpreter_builder


@dataclass
class Launch:
    """Byte addresses touched by one launch: (program, address of every element) in the order of the accesses."""

    kernel: str
    tensors: list[tuple[int, int]]
    loads: list[tuple[int, np.ndarray]] = field(default_factory=list)
    stores: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def check(self) -> None:
        """Raise AssertionError where two programs' accesses collide, or one leaves the tensors."""
        starts, ends = (np.array(sorted(v), dtype=np.int64) for v in zip(*self.tensors, strict=True))
        for program, address in (*self.loads, *self.stores):
            place = np.searchsorted(starts, address, side="right") - 1
            assert (place >= 0).all(), f"{self.kernel}: program {program} reads or writes before every tensor"
            assert (address < ends[place]).all(), f"{self.kernel}: program {program} reads or writes past a tensor"
        written, writer = _flat(self.stores)
        unique, first = np.unique(written, return_index=True)
        owner = writer[first]
        clash = writer != owner[np.searchsorted(unique, written)]
        assert not clash.any(), f"{self.kernel}: {clash.sum()} elements written by more than one program"
        read, reader = _flat(self.loads)
        place = np.minimum(np.searchsorted(unique, read), max(0, len(unique) - 1))
        shared = (unique[place] == read) & (owner[place] != reader) if len(unique) else np.zeros(0, dtype=bool)
        assert not shared.any(), f"{self.kernel}: {shared.sum()} elements read by a program and written by another"


def _flat(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not accesses:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return (
        np.concatenate([a for _, a in accesses]),
        np.concatenate([np.full(len(a), program, dtype=np.int64) for program, a in accesses]),
    )


@contextmanager
def recorded(patch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Record every launch of the block; call `check` on each."""
    launches: list[Launch] = []
    run, load, store = (
        interpreter.GridExecutor.__call__,
        _BUILDER.create_masked_load,
        _BUILDER.create_masked_store,
    )

    def program() -> int:
        x, y, z = _BUILDER.grid_idx
        return int((x * 65536 + y) * 65536 + z)

    def touched(pointers: Any, mask: Any) -> np.ndarray:
        on = np.broadcast_to(mask.data, pointers.data.shape)
        return np.asarray(pointers.data[on], dtype=np.int64).ravel()

    def recording_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        spans = {(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors}
        launches.append(Launch(self.fn.__name__, sorted(spans)))
        return run(self, *args, **kwargs)

    def recording_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].loads.append((program(), touched(pointers, mask)))
        return load(pointers, mask, *rest, **named)

    def recording_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].stores.append((program(), touched(pointers, mask)))
        return store(pointers, value, mask, *rest, **named)

    with patch.context() as inside:
        inside.setattr(interpreter.GridExecutor, "__call__", recording_run)
        inside.setattr(_BUILDER, "create_masked_load", recording_load)
        inside.setattr(_BUILDER, "create_masked_store", recording_store)
        yield launches
