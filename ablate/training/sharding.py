"""Fully sharded training (FSDP2): each process keeps its share of every weight, gradient and optimizer state.

Checkpoints hold whole tensors, as those of one process do, so that a run goes on with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.optim import Optimizer

from ablate.model.transformer import Transformer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model over the processes of a mesh, each block by itself, so that one block at a time is whole.

    Weights are cut along d, their last dimension, where the processes divide it: trees are few and rows are odd.
    """

    def along_d(parameter: nn.Parameter) -> Shard:
        divides = parameter.ndim >= 2 and parameter.shape[-1] % mesh.size() == 0
        return Shard(parameter.ndim - 1) if divides else Shard(0)

    blocks = list(model.blocks) if isinstance(model, Transformer) else []
    for block in blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=along_d)
    # What is outside the blocks is needed first and last, so it stays whole from the forward to the backward pass.
    fully_shard(model, mesh=mesh, shard_placement_fn=along_d, reshard_after_forward=False)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold every weight whole in every process; all of them enter and leave together. Nothing for a model that is whole.

    In between a process runs the model as often as it likes and reads its weights: it waits for no other.
    """
    units = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)  # see `shard`
            unit.set_reshard_after_backward(True, recurse=False)
            unit.reshard()


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Return the whole state dict of a sharded model on the CPU, in rank 0; empty in the others. All take part."""
    return get_model_state_dict(model, options=_WHOLE)


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for sharded models, with checkpoints of the form that one process writes and reads.

    Lightning's own number the optimizer's tensors in the model's order; the optimizer's may be another.
    """

    def __init__(self, environment: ClusterEnvironment, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.cluster_environment = environment

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Have the optimizer restored by `load_optimizer_state_dict`."""
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's whole state by number; empty but in rank 0."""
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        named: dict[str, Any] = get_optimizer_state_dict(self.model, inner, options=_WHOLE)
        if not named:
            return {}
        numbers = {name: i for i, name in enumerate(n for g in named["param_groups"] for n in g["params"])}
        groups = [g | {"params": [numbers[n] for n in g["params"]]} for g in named["param_groups"]]
        return {"state": {numbers[name]: state for name, state in named["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file, in every process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's share of the weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's share of the optimizers' states."""
        assert self.model is not None
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            groups = [g | {"params": [order[i] for i in g["params"]]} for g in saved["param_groups"]]
            state = {order[i]: s for i, s in saved["state"].items()}
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, optimizer, {"state": state, "param_groups": groups}, options=options)
