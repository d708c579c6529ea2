"""Seconds of the same work by several contenders: in turn on a CPU, between device events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ablate.bench.contenders import Contender

RUNS, MIN_RUNS = 15, 3
BUDGET_SECONDS = 3.0
"""A contender that has used this much time and has `MIN_RUNS` runs is not run again."""

Timed = tuple[Callable[[], object], float]
"""What to time, and which share of the tokens it computes."""


def calls_of(contenders: dict[str, Contender], x: Tensor, pass_: str) -> dict[str, Timed]:
    """Return what to time of each contender that can do the pass (`forward` or `forward_backward`) on x [N, d]."""
    calls: dict[str, Timed] = {}
    for name, c in contenders.items():
        share = c.forward_share if pass_ == "forward" else c.train_share
        if share > 0:
            part = x[: round(share * len(x))]
            calls[name] = (_forward(c, part) if pass_ == "forward" else _step(c, part)), share
    return calls


def _forward(contender: Contender, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return contender.call(x)

    return call


def _step(contender: Contender, x: Tensor) -> Callable[[], object]:
    """Gradients of the input and of all parameters, as a training step takes them; no optimizer."""
    train, inputs, gy = contender.train or contender.call, x.detach().requires_grad_(), torch.ones_like(x)
    wanted = [inputs, *contender.parameters]
    return lambda: torch.autograd.grad(train(inputs), wanted, gy)


def in_turn(calls: dict[str, Timed], runs: int = RUNS) -> dict[str, list[float]]:
    """Return wall-clock seconds of each call, one after the other, round after round: slow drifts hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call, _ in calls.values():
        call()
    for _ in range(runs):
        for name, (call, share) in calls.items():
            if len(times[name]) >= MIN_RUNS and sum(times[name]) * share > BUDGET_SECONDS:
                continue
            started = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - started) / share)
    return times


def on_gpu(calls: dict[str, Timed], *, warmup: int = 50, rep: int = 300) -> dict[str, list[float]]:
    """Return seconds between device events, the second-level cache cleared before each run.

    `warmup` and `rep` are the milliseconds spent before and while measuring one call.
    """
    from triton.testing import do_bench  # type: ignore[import-untyped]

    return {
        name: [ms / 1e3 / share for ms in do_bench(call, warmup=warmup, rep=rep, return_mode="all")]
        for name, (call, share) in calls.items()
    }
