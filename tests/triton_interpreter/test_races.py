"""The ownership arguments written beside the kernels, checked on what the kernels really read and write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from triton.runtime.errors import InterpreterError  # type: ignore[import-untyped]

from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton import backend as launch
from tests.kernels.contract import Case, Layer
from tests.triton_interpreter.races import recorded

pytestmark = pytest.mark.usefixtures("checks_overflow")
TWO_STAGES: dict[str, Any] = {"trees": 2, "depth": 4, "leaf_width": 1}
ONE_STAGE: dict[str, Any] = {"trees": 3, "depth": 3, "leaf_width": 3}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("fields", "pinned", "kernels"),
    [
        (
            TWO_STAGES,
            {"strategy": "tiles", "always_tile": True, "tile_levels": 2},
            {"tile_dots", "spread", "tile_wgrad"},
        ),
        (ONE_STAGE, {"strategy": "tiles", "always_tile": True, "split_tokens": 8}, {"tile_wgrad", "fold"}),
        (ONE_STAGE | {"placement": "tree"}, {"strategy": "tiles", "always_tile": True}, {"spread"}),
        (ONE_STAGE | {"placement": "sum"}, {"strategy": "masked"}, {"tile_dots", "spread"}),
        (ONE_STAGE | {"node_output": False}, {"strategy": "gather"}, {"row_dots", "spread"}),
        ({"trees": 1, "depth": 2, "leaf_width": 70}, {"strategy": "tiles", "always_tile": True}, {"tile_dots"}),
    ],
    ids=["two stages", "split segments", "placement tree", "masked", "gather", "wide leaves"],
)
def test_no_two_programs_share_an_element(
    fields: dict[str, Any], pinned: dict[str, Any], kernels: set[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random routings (tokens, weights and thresholds are drawn anew), forward and backward, odd tokens and columns."""
    case = Case(why="races", tokens=75, d=23, spec=TreeSpec(**fields), thresholds=True, seed=seed, hot=seed == 1)
    with launch.using(**pinned), recorded(monkeypatch) as launches:
        Layer.of(case, torch.float32, "cpu").call("triton")
    assert kernels | ({"path_grad"} if case.spec.placement == "unit" else set()) <= {one.kernel for one in launches}
    for one in launches:
        assert one.stores, one.kernel
        one.check()


@triton.jit  # type: ignore[untyped-decorator]
def _racy(out_ptr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[0] += 1 from every program."""
    tl.store(out_ptr, tl.load(out_ptr) + 1)


@triton.jit  # type: ignore[untyped-decorator]
def _peeking(out_ptr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program i writes out[i] and reads out[i - 1]."""
    i = tl.program_id(0)
    tl.store(out_ptr + i, i + tl.load(out_ptr + i - 1, mask=i > 0, other=0))


@triton.jit  # type: ignore[untyped-decorator]
def _straying(out_ptr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads one element past the end."""
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.load(out_ptr + i + 1))


@triton.jit  # type: ignore[untyped-decorator]
def _overflowing(out_ptr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Doubles an int32 that is too large for it."""
    value = tl.load(out_ptr)
    tl.store(out_ptr, value + value)


def test_an_overflow_is_seen() -> None:
    out = torch.full((1,), 2**30, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="overflow"):
        _overflowing[(1,)](out, block=1)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [(_racy, "more than one program"), (_peeking, "written by another"), (_straying, "past a tensor")],
)
def test_the_recorder_sees_a_planted_fault(kernel: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.zeros(16, dtype=torch.int32)[:8]
    with recorded(monkeypatch) as launches:
        kernel[(8,)](out, block=1)
    with pytest.raises(AssertionError, match=message):
        launches[0].check()
