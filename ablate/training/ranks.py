"""Several processes of one trial (`train.devices`): the caller is rank 0, starts the others and ends them.

Lightning's own launchers run the user's script again, which a worker of a study does not have.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment, find_free_network_port
from lightning.pytorch.strategies import DDPStrategy, Strategy

from ablate.config import Train
from ablate.training.lifeline import guarded, out_of_reach
from ablate.training.sharding import Sharded


@dataclass(frozen=True, slots=True)
class Place:
    """One process among those of a trial, all on this machine."""

    rank: int
    port: int
    """Where rank 0 listens, on loopback."""


class _Environment(LightningEnvironment):
    """Tells Lightning that its processes are there already."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self._place.port

    def local_rank(self) -> int:
        return self._place.rank

    def node_rank(self) -> int:
        return 0


def strategy(place: Place, train: Train) -> Strategy:
    """Return how a trial's processes share it: DDP, each with the whole model, or sharded; gloo on CPUs.

    Buffers stay each rank's own: they are sums of what the rank saw (added up over ranks where they are read) or the same
    on all of them.
    """
    if train.strategy == "fsdp":
        return Sharded(_Environment(place), train.devices)
    return DDPStrategy(cluster_environment=_Environment(place), broadcast_buffers=False)


@contextmanager
def started(devices: int, run: Callable[[Place], object]) -> Iterator[Place]:
    """Run `run`, which is pickled, as ranks 1 to devices - 1; gives rank 0's place to the caller.

    The others are gone and the process group is closed at the end; where the caller ends well, it waits for them.
    """
    context = multiprocessing.get_context("spawn")
    port = find_free_network_port()
    others = [
        context.Process(
            target=guarded,
            args=(os.getpid(), pickle.dumps(partial(_main, run, Place(rank, port)))),
            name=f"ablate-rank-{rank}",
        )
        for rank in range(1, devices)
    ]
    with out_of_reach():
        for process in others:
            process.start()
    try:
        yield Place(0, port)
        for process in others:
            process.join()
    finally:
        for process in others:
            process.kill()
            process.join()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _main(run: Callable[[Place], object], place: Place) -> None:
    # Who is asked to stop is rank 0; the others hear it from there.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run(place)
