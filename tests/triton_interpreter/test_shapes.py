"""What the contract's small trees do not reach: several stages, mixed tilings, split sums, wide leaves, large depths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ablate.kernels.op import route
from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton import backend as launch
from ablate.kernels.triton.tiling import make_tiling
from tests.kernels.contract import Case, Layer, check

FP32, BF16 = torch.float32, torch.bfloat16


def case(why: str, tokens: int, d: int = 16, hot: bool = False, **fields: Any) -> Case:
    spec = TreeSpec(**{"trees": 1, "leaf_width": 1, **fields})
    return Case(why=why, tokens=tokens, d=d, spec=spec, thresholds=True, hot=hot)


@pytest.mark.parametrize(
    ("one", "dtype", "pinned"),
    [
        pytest.param(case("stages of four and three levels", 30, depth=7), FP32, {}, marks=pytest.mark.soak),
        pytest.param(case("three stages", 70, depth=5), FP32, {"tile_levels": 2}, marks=pytest.mark.soak),
        (case("three stages, bf16", 70, depth=4, leaf_width=2), BF16, {"tile_levels": 2}),
        (case("two stages, hot leaf", 140, depth=4, hot=True), FP32, {"tile_levels": 2}),
        (case("two stages, tree", 30, depth=4, trees=2, placement="tree"), FP32, {"tile_levels": 2}),
        (case("two stages, sum", 30, depth=4, placement="sum"), FP32, {"tile_levels": 2}),
        (case("two stages, frozen nodes", 70, depth=4, node_output=False), FP32, {"tile_levels": 2}),
        (case("leaf wider than a tile", 30, depth=2, leaf_width=70), FP32, {}),
        (case("dense layer wider than a tile", 30, depth=0, leaf_width=130), FP32, {}),
        (case("leaf as wide as a tile", 30, depth=2, leaf_width=64), FP32, {}),
        (case("d of several blocks and a rest", 20, d=148, depth=3), FP32, {"tile_levels": 2}),
        (case("segments split in runs", 150, depth=3), FP32, {"split_tokens": 40}),
    ],
    ids=lambda v: str(v).replace(" ", "-") if isinstance(v, Case) else None,
)
def test_all_tiles(one: Case, dtype: torch.dtype, pinned: dict[str, Any]) -> None:
    with launch.using(strategy="tiles", always_tile=True, **pinned):
        check(one, "triton", dtype)


@pytest.mark.usefixtures("checks_overflow")
def test_segments_split_over_two_stages() -> None:
    with launch.using(strategy="tiles", always_tile=True, split_tokens=16, tile_levels=2):
        check(case("segments split, two stages, bf16", 150, depth=4), "triton", BF16)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("one", "dtype"),
    [
        (case("two full stages", 70, depth=12), FP32),
        (case("three full stages", 40, depth=13), FP32),
        (case("deepest, hot leaf, bf16", 140, depth=14, hot=True), BF16),
        (case("mixed heights", 140, depth=11, trees=2, leaf_width=3, placement="tree"), FP32),
    ],
    ids=lambda v: str(v).replace(" ", "-") if isinstance(v, Case) else None,
)
def test_large_depths(one: Case, dtype: torch.dtype) -> None:
    with launch.using(strategy="tiles", always_tile=True):
        check(one, "triton", dtype)


@pytest.mark.usefixtures("checks_overflow")
def test_levels_without_enough_tokens_are_walked_row_by_row() -> None:
    one = case("tiles above, rows below", 30, depth=6, trees=2, leaf_width=3)
    tiling = make_tiling(one.spec, 32, "bf16", "tiles", levels=4)
    assert len(tiling.stages) == 1
    assert tiling.row_level == 3
    with launch.using(strategy="tiles", tile_levels=4):
        check(one, "triton", BF16)


@pytest.mark.usefixtures("checks_overflow")
def test_row_leaves_below_a_sorted_stage() -> None:
    one = case("rows for leaves alone", 100, depth=6)
    tiling = make_tiling(one.spec, 128, "bf16", "tiles", levels=3)
    assert len(tiling.stages) == 2
    assert tiling.leaves is None
    assert tiling.sorted
    with launch.using(strategy="tiles", tile_levels=3):
        check(one, "triton", BF16)


def test_gather_beyond_one_tile() -> None:
    with launch.using(strategy="gather"):
        check(case("gather", 20, depth=7, leaf_width=2), "triton", FP32)


@pytest.mark.usefixtures("checks_overflow")
def test_masked_trees_deeper_than_one_tile_visit_every_tile_they_need() -> None:
    with launch.using(strategy="masked", tile_levels=2):
        check(case("masked", 80, depth=4), "triton", FP32)


@pytest.mark.parametrize("place", [0, 1])
def test_every_shipped_configuration_computes_the_same(place: int) -> None:
    named = (("tile_dots", place), ("spread", place), ("tile_wgrad", place))
    with launch.using(strategy="tiles", always_tile=True, tile_levels=2, config=named):
        check(case("configuration", 70, depth=4), "triton", BF16)
    with launch.using(strategy="gather", config=(("row_dots", place),)):
        check(case("configuration", 9, depth=4), "triton", BF16)


def test_chosen_strategy_when_nothing_is_pinned(caplog: pytest.LogCaptureFixture) -> None:
    launch.forget_choices()
    with caplog.at_level("INFO", logger="ablate.kernels.triton.backend"):
        check(case("own choice", 20, depth=3), "triton", FP32)
        check(case("own choice", 20, depth=3), "triton", FP32)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1, said
    assert "predicted" in said[0]


def test_a_router_of_node_rows_alone_decides_as_the_whole_layer() -> None:
    """A frozen router hands `route` node rows without leaf rows."""
    layer = Layer.of(case("router", 30, depth=5, trees=2), FP32, "cpu")
    spec = layer.case.spec
    assert layer.b is not None
    both = [
        route(layer.x, w, b, spec, thresholds=layer.thresholds, backend="triton")
        for w, b in ((layer.w_in, layer.b), (layer.w_in[:, : spec.nodes], layer.b[:, : spec.nodes]))
    ]
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])


def test_responses_that_are_not_numbers_go_left_and_stay_with_their_token() -> None:
    """A NaN token must not reach its neighbours in a tile through the selection of path lanes."""
    layer = Layer.of(case("nan", 30, depth=4), FP32, "cpu")
    clean, _ = layer.call("triton")
    layer.x[7] = torch.nan
    with launch.using(strategy="tiles", always_tile=True, tile_levels=2):
        out, _ = layer.call("triton")
    others = torch.arange(30) != 7
    assert int(out.leaves[7, 0]) == 0
    assert torch.equal(out.leaves[others], clean.leaves[others])
    assert out.y[7].isnan().all()
    assert not out.y[others].isnan().any()


def test_wrong_dtypes_are_refused() -> None:
    layer = Layer.of(case("dtypes", 4, depth=2), FP32, "cpu")
    with pytest.raises(TypeError, match="one dtype"):
        route(layer.x.double(), layer.w_in.double(), None, layer.case.spec, backend="triton")
    with pytest.raises(TypeError, match="one dtype"):
        route(layer.x.bfloat16(), layer.w_in, None, layer.case.spec, backend="triton")
