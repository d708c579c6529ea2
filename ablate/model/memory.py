"""The least memory that a trial needs, by formula, so that what no machine at hand can hold is refused before any work."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from ablate.config import ConfigError, Trial
from ablate.model.counts import count, count_layer

GIB = 2**30
# Bytes of a parameter in training: its value, its gradient and AdamW's two moments, four each.
_STATE = 16
# Bytes of a number that is kept for the backward pass: of the narrowest type that is trained in.
_KEPT = 2
# Numbers of the model's width that a block keeps for each position, more in truth; its input alone where it is computed again.
_PER_BLOCK, _CHECKPOINTED = 4, 1


def least_bytes(trial: Trial) -> tuple[int, int]:
    """Return bytes of parameters with their state, and of what a micro-batch keeps, both rounded down on purpose.

    Operators' scratch memory, evaluations and the process itself come on top; `ablate size` counts all of it.
    """
    model, train = trial.model, trial.train
    language = trial.task.kind == "language"
    blocks = 1 if trial.task.kind == "teacher" else model.blocks
    vocab = (257 if trial.corpus.tokenizer == "bytes" else trial.corpus.vocab_size) if language else 0
    if language and trial.corpus.tokenizer == "file":
        vocab = 0  # that file says
    parameters = count(trial, vocab).total_params if language else blocks * count_layer(trial).total_params
    positions = train.batch_size // (train.accumulate * train.devices) * trial.positions
    kept = _CHECKPOINTED if train.activation_checkpointing else _PER_BLOCK
    return _STATE * parameters, _KEPT * positions * (blocks * model.d_model * kept + vocab)


def machine_bytes() -> tuple[int, str]:
    """Return the memory that trials have at most on this machine, and what it is that has so much."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        import torch

        if torch.cuda.is_available():
            sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
            return max(sizes), "the largest GPU here"
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    with suppress(OSError, ValueError):  # a container's own limit, where it has one
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total, "this machine"


def check_memory(trials: Iterable[tuple[str, Trial]], workers: int = 1) -> None:
    """Refuse trials, given with their arms' names, that cannot fit even by the least that they need.

    Raises:
        ConfigError: the largest of them is too large, or too large for so many workers at once.
    """
    needs = [(least_bytes(trial), arm, trial) for arm, trial in trials]
    if not needs:
        return
    (state, kept), arm, trial = max(needs, key=lambda need: sum(need[0]))
    has, whose = machine_bytes()
    if state + kept <= has and (workers * (state + kept) <= has or whose != "this machine"):
        return
    model, train = trial.model, trial.train
    one = f"{arm} needs at least {_gib(state + kept)} of memory"
    shape = (
        f"d_model {model.d_model}, {model.blocks} blocks, batch_size {train.batch_size}, accumulate {train.accumulate}"
    )
    parts = f"{_gib(state)} for parameters and their state, {_gib(kept)} for a micro-batch; {shape}"
    if state + kept > has:
        raise ConfigError(
            f"{one} ({parts}): {whose} has {_gib(has)}; make it smaller, or a batch with train.accumulate"
        )
    raise ConfigError(f"workers is {workers}: {one} ({parts}), and {whose} has {_gib(has)}")


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
