"""Sums and lists over the processes that train one model; without a process group there is one process."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if on else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> None:
    """Add up a tensor over all processes, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that is sharded over processes, which all take part; any other as it is."""
    gather_all = getattr(tensor, "full_tensor", None)  # not by class: its import takes a second
    return tensor if gather_all is None else gather_all()


def gather(value: T) -> list[T]:
    """Return every process's value, in order of rank; values are pickled."""
    if world_size() == 1:
        return [value]
    everyone: list[T] = [value] * world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone
