"""Measure strategies and configurations of the Triton backend for a shape; keep the fastest in the table on disk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton import backend as launch
from ablate.kernels.triton import tuned
from ablate.kernels.triton.passes import INTERPRETED
from ablate.kernels.triton.tiling import KERNELS, STRATEGIES, Strategy, configs

Measure = Callable[[Callable[[], object]], float]


def tune(
    spec: TreeSpec,
    tokens: int,
    d: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    *,
    measure: Measure | None = None,
) -> tuned.Entry:
    """Record the fastest strategy and configurations for both passes at one shape; return seconds of the winner.

    The strategy is chosen with the shipped defaults, then each kernel's configuration in turn, with the winners so far.
    Tokens are random, so their use of the leaves is fairly even. `measure` gives the seconds of a call (default: median
    of device time). Launches of this process use the new entry from then on. Raises as `launch.forward` does.
    """
    step, took = _step(spec, tokens, d, dtype, device), measure or seconds

    def timed(strategy: Strategy, places: dict[str, int]) -> float:
        with launch.using(strategy=strategy, config=tuple(places.items())):
            return took(step)

    by_strategy = {strategy: timed(strategy, {}) for strategy in STRATEGIES}
    strategy = min(by_strategy, key=by_strategy.__getitem__)
    best = tuned.Entry(strategy, {}, by_strategy[strategy])
    name = launch.DTYPES[dtype]
    for kernel in KERNELS:
        for place in range(1, len(configs(kernel, name))):
            places = best.configs | {kernel: place}
            spent = timed(strategy, places)
            if spent < best.seconds:
                best = replace(best, configs=places, seconds=spent)
    tuned.record(launch.device_name(torch.device(device)), spec, tokens, launch.padded_width(d), name, best)
    launch.forget_choices()
    return best


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of a call after three to warm up: between device events on a GPU, wall clock in the interpreter."""
    if INTERPRETED:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    for _ in range(3):
        call()
    spent: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(spent)


def _step(spec: TreeSpec, tokens: int, d: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """A forward and a backward pass over random numbers."""
    g = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

    x, gy = draw(tokens, d), draw(tokens, d)
    w_in, b = draw(spec.trees, spec.in_rows, d, scale=d**-0.5), draw(spec.trees, spec.in_rows, scale=0.1)
    w_out = draw(spec.trees, spec.out_rows, d, scale=(spec.trees * spec.path) ** -0.5)

    def step() -> object:
        _, leaves, responses = launch.forward(x, w_in, b, w_out, None, None, spec)
        return launch.backward(gy, x, w_in, b, w_out, leaves, responses, spec, (True, True, True, True))

    return step
