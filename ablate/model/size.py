"""What a configuration needs, before anything is trained: parameters, arithmetic, memory per device, tokens a day.

The model is built on the meta device, which holds shapes and no numbers, so that parameters are counted, not computed
by formula. Memory is found by running an optimizer step on fake tensors (shapes again, with the device's own choice
of operators) and adding up the storages that are alive at the same time.

Counted: parameters, gradients, Adam's two moments, everything kept for the backward pass, the logits and their
gradient, and results of operators while they live. Not counted: the process itself (interpreter, libraries, code
compiled at run time), an operator's own scratch memory, what an allocator loses to fragmentation, a GPU's context.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ablate.config import ConfigError, Section, Trial
from ablate.model.counts import Cost, count
from ablate.model.transformer import Block, Transformer

GPUS = (1, 2, 4, 8, 16, 32, 64)
SECONDS_A_DAY = 86400
GIB = 2**30

Precision = Literal["fp32", "bf16"]


class StepMemory(Section):
    """Bytes of one training step on one device; parts add up to more than `peak` where they are not alive together."""

    sequences: int
    """In a micro-batch."""
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """The most that is alive at once beside parameters, gradients and the optimizer's state."""
    peak: int


class DeviceMemory(Section):
    """Bytes per device when `gpus` devices share one optimizer step."""

    gpus: int
    sequences: int
    """A device's micro-batch."""
    ddp: int
    ddp_checkpointed: int
    fsdp: int
    fsdp_checkpointed: int
    tokens_per_day: float | None
    """From the stated throughput times the devices: what perfect scaling would give."""


class Size(Section):
    """What one configuration needs."""

    cost: Cost
    vocab_size: int
    meta_params: int
    """Parameters of the model built on the meta device; equal to cost.total_params."""
    training_flops_per_token: int
    """Forward and backward: three times the forward; four with activation checkpointing."""
    precision: Precision
    tokens_per_second: float | None
    """Of one device, as stated by whoever asked."""
    devices: list[DeviceMemory]


def size(
    trial: Trial,
    *,
    gpus: Iterable[int] = GPUS,
    tokens_per_second: float | None = None,
    precision: Precision | None = None,
) -> Size:
    """Everything of `Size` for a trial; the vocabulary is `corpus.vocab_size`, and precision bf16 unless it is set.

    The micro-batch is batch_size / (accumulate · devices) sequences, fewer where more GPUs share the batch. DDP holds
    all states on each device and a copy of the gradients in its buckets. FSDP (fully sharded, a block or the embedding
    at a time) holds its share of the states, and of the largest such unit two sets of parameters (one in use, one on
    its way) and one of gradients. One GPU shares nothing. A count of GPUs above batch_size is left out. Raises
    ConfigError for a task other than language, and for a throughput or a count that is not above 0.
    """
    if trial.task.kind != "language":
        raise ConfigError(f"task.kind is {trial.task.kind!r}: sizes are those of language models")
    if tokens_per_second is not None and tokens_per_second <= 0:
        raise ConfigError(f"tokens_per_second is {tokens_per_second}: it must be above 0")
    train, counts = trial.train, list(gpus)
    if not counts or min(counts) < 1:
        raise ConfigError(f"gpus is {counts}: counts of 1 and more are expected")
    chosen: Precision = precision or ("fp32" if train.precision == "fp32" else "bf16")
    vocab_size = 257 if trial.corpus.tokenizer == "bytes" else trial.corpus.vocab_size
    model = on_meta(trial, vocab_size)
    micro = train.batch_size // (train.accumulate * train.devices)
    known: dict[tuple[int, bool, bool], StepMemory] = {}

    def step(sequences: int, *, checkpointing: bool, sharded: bool) -> StepMemory:
        key = (sequences, checkpointing, sharded)
        if key not in known:
            known[key] = step_memory(
                trial, vocab_size, sequences=sequences, checkpointing=checkpointing, precision=chosen, cast=not sharded
            )
        return known[key]

    width = 2 if chosen == "bf16" else 4
    block = max(_elements(m) for m in model.modules() if isinstance(m, Block))
    unit = max(block, model.embedding.numel())
    devices = []
    for n in counts:
        if n > train.batch_size:
            continue
        sequences = min(micro, train.batch_size // n)
        peaks = []
        for checkpointing in (False, True):
            whole = step(sequences, checkpointing=checkpointing, sharded=False)
            part = step(sequences, checkpointing=checkpointing, sharded=True)
            if n == 1:
                peaks.append((whole.peak, whole.peak))
                continue
            states = whole.parameters + whole.gradients + whole.optimizer
            peaks.append((whole.peak + whole.gradients, states // n + 3 * unit * width + part.activations))
        devices.append(
            DeviceMemory(
                gpus=n,
                sequences=sequences,
                ddp=peaks[0][0],
                ddp_checkpointed=peaks[1][0],
                fsdp=peaks[0][1],
                fsdp_checkpointed=peaks[1][1],
                tokens_per_day=None if tokens_per_second is None else tokens_per_second * SECONDS_A_DAY * n,
            )
        )
    cost = count(trial, vocab_size)
    return Size(
        cost=cost,
        vocab_size=vocab_size,
        meta_params=_elements(model),
        training_flops_per_token=cost.flops_per_token * (4 if train.activation_checkpointing else 3),
        precision=chosen,
        tokens_per_second=tokens_per_second,
        devices=devices,
    )


def describe(found: Size) -> str:
    """The same as text, for people."""
    cost = found.cost
    lines = [
        f"parameters        {cost.total_params:,}",
        f"active parameters {cost.active_params:,} a token ({cost.active_params / cost.total_params:.1%})",
        f"units             {cost.total_units:,} a block, {cost.active_units:,} active ({cost.active_frac:.2%})",
        f"FLOPs a token     {cost.flops_per_token:.4g} forward, {found.training_flops_per_token:.4g} in training",
        "",
        f"memory per device, GiB ({found.precision}; a micro-batch of whole sequences; ck = activation checkpointing)",
        f"{'GPUs':>5} {'sequences':>9} {'DDP':>8} {'DDP+ck':>8} {'FSDP':>8} {'FSDP+ck':>8} {'tokens/day':>11}",
    ]
    for row in found.devices:
        memory = (row.ddp, row.ddp_checkpointed, row.fsdp, row.fsdp_checkpointed)
        shown = " ".join(f"{m / GIB:8.2f}" for m in memory)
        day = "-" if row.tokens_per_day is None else f"{row.tokens_per_day:.3g}"
        lines.append(f"{row.gpus:5} {row.sequences:9} {shown} {day:>11}")
    if found.tokens_per_second is None:
        lines.append("tokens/day needs a stated throughput per device")
    else:
        lines.append(f"tokens/day: {found.tokens_per_second:g} tokens/s a device as stated, times the devices")
    return "\n".join(lines)


def on_meta(trial: Trial, vocab_size: int) -> Transformer:
    """The model without its numbers."""
    # What looks at data or decides by data has no shapes of its own and cannot run without numbers.
    plain = {"init": "uniform", "routing": "sign", "router_input": "raw", "router": "tied"}
    tree = trial.tree.model_copy(update=plain)
    with torch.device("meta"):
        return Transformer(trial.model_copy(update={"tree": tree}), vocab_size)


def step_memory(
    trial: Trial, vocab_size: int, *, sequences: int, checkpointing: bool, precision: Precision, cast: bool = True
) -> StepMemory:
    """Memory of an optimizer step with AdamW, in the last of its micro-batches of `sequences`.

    bf16 is mixed precision (float32 weights, cast as needed) with `cast`, and else weights that are bf16 already, as
    under FSDP. Loss and clipping are those of training.
    """
    model = on_meta(trial, vocab_size)
    model.checkpointing = checkpointing
    for mixture in model.mixtures():
        mixture.even = True
    if precision == "bf16" and not cast:
        model.bfloat16()
    context, bf16 = trial.model.context, precision == "bf16"
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        model.to_empty(device="cpu").train()
        parameters = list(model.parameters())
        for parameter in parameters:
            live.keep(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: live.keep(p.grad))  # type: ignore[no-untyped-call]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        tokens = torch.zeros(sequences, context + 1, dtype=torch.int64)
        # An earlier step has made the optimizer's state, an earlier micro-batch the gradients.
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            live.keep(parameter.grad)
        optimizer.step()
        for state in optimizer.state.values():
            for value in state.values():
                live.keep(value)
        gradients = sum(_bytes(p.grad) for p in parameters)
        if trial.train.accumulate == 1:
            optimizer.zero_grad()
        live.restart()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and cast):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, vocab_size).float(), tokens[:, 1:].reshape(-1))
        del logits
        torch.autograd.backward(loss)
        del loss
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return StepMemory(
            sequences=sequences,
            parameters=sum(_bytes(p) for p in parameters),
            gradients=gradients,
            optimizer=sum(_bytes(v) for state in optimizer.state.values() for v in state.values()),
            activations=live.loose_peak,
            peak=live.peak,
        )


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages of all results of operators for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.loose = self.peak = self.loose_peak = 0
        self._kept: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for result in tree_leaves(out):
            if isinstance(result, Tensor):
                self._see(result)
        return out

    def restart(self) -> None:
        """Peaks from here on."""
        self.peak, self.loose_peak = self.total, self.loose

    def keep(self, tensor: Tensor | None) -> None:
        """From now on this is no activation: a parameter, a gradient, a moment."""
        if tensor is not None:
            storage = tensor.untyped_storage()
            self._see(tensor)
            if not self._kept[storage][0]:
                self._kept[storage][0] = True
                self.loose -= storage.nbytes()

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._kept:
            return
        flag, count_ = [False], storage.nbytes()
        self._kept[storage] = flag
        weakref.finalize(storage, self._drop, flag, count_)
        self.total += count_
        self.loose += count_
        self.peak, self.loose_peak = max(self.peak, self.total), max(self.loose_peak, self.loose)

    def _drop(self, flag: list[bool], count_: int) -> None:
        self.total -= count_
        if not flag[0]:
            self.loose -= count_


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
