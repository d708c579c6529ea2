"""Training a converted model further: a plain loop over a prepared corpus, for any causal model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.config import ConfigError, Train
from ablate.data.module import TokenData
from ablate.data.tokens import Prepared
from ablate.evaluation.bits_per_byte import logits_of
from ablate.model.mlps import TreeMlp, find_mlps
from ablate.model.tree import TreeFeedForward
from ablate.training.optimizer import TreeAdamW
from ablate.training.schedule import learning_rate

Objective = Literal["tokens", "distill", "layers"]


def finetune(
    model: nn.Module,
    prepared: Prepared,
    train: Train,
    *,
    context: int,
    trainable: Literal["trees", "all"] = "all",
    objective: Objective = "tokens",
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    data_seed: int = 0,
    stepped: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place for `train.steps` steps on windows of `context` tokens; returns every step's loss (nats).

    Args:
        model: a causal model whose MLPs are trees (any other is trained just as well).
        prepared: the corpus, tokenized as the model expects.
        train: steps, batch size, learning rate and schedule, decay, clipping; one device, the model's own dtype.
        context: T, at most what the model takes.
        trainable: `trees` freezes everything but the tree layers and their biases (attention, embeddings, norms).
        objective: `tokens` is next-token loss; `distill` mixes in the divergence from the teacher's distribution (arXiv
            1503.02531); `layers` has every tree layer learn by itself to give what the teacher's MLP gives on the
            teacher's inputs (squared error over the output's variance), nothing passing from layer to layer.
        teacher: the dense model, for `distill` and `layers`.
        distill: share of the divergence in the loss of `distill`.
        data_seed: fixes the order of windows; nothing else is drawn here but dropout.
        stepped: called with the step's number (from 1) and its loss.

    The model's train or eval mode and its `requires_grad` flags are as before afterwards. Raises ConfigError where a
    teacher is missing, or has no MLP where the model has a tree.
    """
    if (objective == "tokens") != (teacher is None):
        raise ConfigError(f"teacher is {'given' if teacher else 'missing'}: objective {objective!r} goes the other way")
    data = TokenData(
        prepared,
        context=context,
        batch_size=train.batch_size // train.accumulate,
        data_seed=data_seed,
        steps=train.steps * train.accumulate,
        eval_tokens=1,
        eval_batch_size=1,
    )
    device = next(model.parameters()).device
    batches = iter(data.train_dataloader())
    trees = [m for m in model.modules() if isinstance(m, TreeFeedForward)]
    losses = []
    with (
        _training(model, trainable if objective != "layers" else "trees"),
        _taught(model, teacher, objective) as taught,
    ):
        optimizer = TreeAdamW(model, train)
        for step in range(train.steps):
            rate = learning_rate(train, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            for _ in range(train.accumulate):
                tokens = next(batches)["tokens"].to(device)
                loss = taught(tokens) if objective == "layers" else _loss(model, teacher, tokens, distill)
                torch.autograd.backward(loss / train.accumulate)
                total += float(loss.detach()) / train.accumulate
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            for tree in trees:
                tree.finish_step(rate / train.lr)
            losses.append(total)
            if stepped is not None:
                stepped(step + 1, total)
    return losses


def _loss(model: nn.Module, teacher: nn.Module | None, tokens: Tensor, distill: float) -> Tensor:
    """Mean next-token loss over ids [B, T + 1], mixed with the divergence from the teacher's distribution."""
    logits = logits_of(model, tokens[:, :-1])
    logits = logits.reshape(-1, logits.shape[-1]).float()
    loss = F.cross_entropy(logits, tokens[:, 1:].reshape(-1))
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = logits_of(teacher, tokens[:, :-1]).reshape(logits.shape).float()
    divergence = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    return (1 - distill) * loss + distill * divergence


@contextmanager
def _training(model: nn.Module, trainable: Literal["trees", "all"]) -> Iterator[None]:
    """Train mode, with gradients only where they are wanted; then as before."""
    was, flags = model.training, {p: p.requires_grad for p in model.parameters()}
    wanted = set(model.parameters())
    if trainable == "trees":
        wanted = {p for m in model.modules() if isinstance(m, TreeMlp | TreeFeedForward) for p in m.parameters()}
    for parameter in flags:
        parameter.requires_grad_(parameter in wanted)
    model.train()
    try:
        yield
    finally:
        model.train(was)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def _taught(model: nn.Module, teacher: nn.Module | None, objective: Objective) -> Iterator[Callable[[Tensor], Tensor]]:
    """The teacher in eval mode, and the loss of `layers`: squared error over the output's variance, mean over layers."""
    if teacher is None:
        yield lambda tokens: tokens.new_zeros(())
        return
    students = {n: m for n, m in model.named_modules() if isinstance(m, TreeMlp)}
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, place: int) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            seen.setdefault(name, [torch.empty(0), torch.empty(0)])[place] = arguments[0] if output is None else output

        return hook

    hooks = []
    if objective == "layers":
        blocks = {f.name: f.pass_through[-1] if f.pass_through else f.name for f in find_mlps(teacher)}
        for name in students:
            if name not in blocks:
                raise ConfigError(f"teacher has no MLP {name!r}, where the model has a tree")
            hooks.append(teacher.get_submodule(name).register_forward_pre_hook(note(name, 0)))
            hooks.append(teacher.get_submodule(blocks[name]).register_forward_hook(note(name, 1)))

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            logits_of(teacher, tokens[:, :-1])
        errors = []
        for name, student in students.items():
            x, y = (t.reshape(-1, t.shape[-1]) for t in seen[name])
            errors.append((student(x) - y).square().sum() / (y - y.mean(0)).square().sum())
        return torch.stack(errors).mean()

    was = teacher.training
    teacher.eval()
    try:
        yield loss
    finally:
        teacher.train(was)
        for handle in hooks:
            handle.remove()
