"""Measured tuning, with a clock that the test holds; the interpreter stands in for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton import backend as launch
from ablate.kernels.triton import tuned
from ablate.kernels.triton.tune import seconds, tune
from tests.kernels.contract import Case, check

SPEC = TreeSpec(trees=1, depth=2, leaf_width=1)


def test_the_fastest_strategy_and_configurations_are_kept_and_used(caplog: pytest.LogCaptureFixture) -> None:
    """The clock says: gather is fast, and its second configuration faster."""

    def clock(call: Callable[[], object]) -> float:
        call()
        policy = launch.pinned()
        strategy = {"tiles": 3.0, "gather": 2.0, "masked": 4.0}[str(policy.strategy)]
        return strategy - 0.5 * dict(policy.config).get("row_dots", 0) + dict(policy.config).get("tile_wgrad", 0)

    best = tune(SPEC, 5, 16, device="cpu", measure=clock)
    assert best == tuned.Entry("gather", {"row_dots": 1}, 1.5)
    assert tuned.lookup("interpreter", SPEC, 7, 16, "bf16") == best
    with caplog.at_level("INFO", logger="ablate.kernels.triton.backend"):
        check(Case(why="tuned", tokens=5, d=16, spec=SPEC), "triton", torch.bfloat16)
    assert "strategy gather (measured)" in caplog.text
    launch.forget_choices()


def test_the_clock_runs_the_call() -> None:
    calls: list[int] = []
    assert seconds(lambda: calls.append(1)) > 0
    assert calls
