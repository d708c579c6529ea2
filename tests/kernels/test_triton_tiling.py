"""How trees are cut into tiles, how tokens are ordered, what is predicted: all of it plain Python and torch on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton import predict, tuned
from ablate.kernels.triton.orders import segments, sort_tokens, splits
from ablate.kernels.triton.tiling import (
    KERNELS,
    MAX_LANES,
    STRATEGIES,
    DType,
    Piece,
    configs,
    grad_pieces,
    heights,
    make_tiling,
    tile_pays,
)

SPECS = st.builds(TreeSpec, trees=st.integers(1, 4), depth=st.integers(0, 14), leaf_width=st.integers(1, 300))


def rows_of(piece: Piece, spec: TreeSpec) -> list[list[int]]:
    """Rows of w_in that each (tile, chunk) of a piece owns, by the formula in `lanes.lanes`."""
    owned = []
    for tile in range(piece.tiles):
        for chunk in range(piece.chunks):
            if piece.height:
                below = [(j + 1).bit_length() - 1 for j in range(piece.lanes)]
                rows = [((tile + (1 << piece.level)) << s) - 1 + (j + 1 - (1 << s)) for j, s in enumerate(below)]
                owned.append([r for r, s in zip(rows, below, strict=True) if s < piece.height])
            else:
                units, first = piece.width << piece.group, chunk * piece.lanes
                count = max(0, min(piece.lanes, units - first))
                owned.append([spec.nodes + tile * units + first + j for j in range(count)])
    return owned


@given(SPECS.filter(lambda s: s.in_rows < 20000))
def test_tiles_of_all_pieces_own_every_row_once(spec: TreeSpec) -> None:
    owned = [rows for piece in grad_pieces(spec) for rows in rows_of(piece, spec)]
    assert all(owned)
    assert sorted(row for rows in owned for row in rows) == list(range(spec.in_rows))


@given(st.integers(0, 14), st.integers(5, 6))
def test_stages_are_few_and_level(depth: int, levels: int) -> None:
    cut = heights(depth, levels)
    assert sum(cut) == depth
    assert len(cut) == -(-depth // levels)
    assert not cut or max(cut) - min(cut) <= 1
    assert list(cut) == sorted(cut, reverse=True)


def test_more_stages_than_the_kernel_adds_up_are_refused() -> None:
    with pytest.raises(ValueError, match="depth 14 takes 4 stages"):
        heights(14, 4)


@given(SPECS, st.integers(1, 1 << 16), st.sampled_from(get_args(DType)), st.sampled_from(STRATEGIES))
def test_every_tiling_covers_every_level_and_fits_a_tile(
    spec: TreeSpec, tokens: int, dtype: DType, strategy: str
) -> None:
    tiling = make_tiling(spec, tokens, dtype, strategy)
    assert sum(p.height for p in tiling.stages) == tiling.row_level <= spec.depth
    assert all(p.lanes <= MAX_LANES and p.lanes > (1 << p.height) - 1 for p in tiling.stages)
    assert tiling.sorted == (strategy == "tiles" and any(p.tiles > 1 for p in tiling.pieces))
    if strategy == "gather":
        assert tiling.pieces == ()
    if strategy == "masked":
        assert tiling.row_level == spec.depth
        assert tiling.leaves is not None


@given(st.integers(1, 4), st.integers(0, 200), st.integers(1, 9), st.integers(0, 99))
def test_segments_hold_exactly_the_tokens_of_their_tile(trees: int, tokens: int, depth: int, seed: int) -> None:
    spec = TreeSpec(trees=trees, depth=depth, leaf_width=3)
    codes = torch.randint(spec.leaves, (tokens, trees), generator=torch.Generator().manual_seed(seed)).int()
    order = sort_tokens(codes, depth)
    assert torch.equal(order.perm.sort(dim=1).values, torch.arange(tokens, dtype=torch.int32).expand(trees, tokens))
    for piece in grad_pieces(spec):
        seg = segments(order, piece, depth, tokens, trees, torch.device("cpu"))
        assert seg.shape == (trees, piece.tiles + 1)
        for k in range(trees):
            tile_of = codes[order.perm[k].long(), k] >> piece.shift
            for tile in range(piece.tiles):
                lo, hi = int(seg[k, tile]), int(seg[k, tile + 1])
                assert (tile_of[lo:hi] == tile).all()
                assert hi - lo == int((tile_of == tile).sum())


def test_sorting_is_stable() -> None:
    codes = torch.tensor([[1], [0], [1], [0], [1]], dtype=torch.int32)
    assert sort_tokens(codes, 1).perm.tolist() == [[1, 3, 0, 2, 4]]


def test_root_gradients_are_split_and_deep_ones_are_not() -> None:
    pieces = grad_pieces(TreeSpec(trees=1, depth=12, leaf_width=1))
    found = [splits(p, 8192, 768, 1, 64, 256) for p in pieces]
    assert found == [22, 1, 1]


@pytest.mark.parametrize("dtype", get_args(DType))
def test_few_tokens_in_a_tile_do_not_pay(dtype: DType) -> None:
    last = grad_pieces(TreeSpec(trees=1, depth=12, leaf_width=1))[1]
    assert not tile_pays(last, 4 * last.tiles, dtype)
    assert tile_pays(last, 128 * last.tiles, "bf16")


def test_every_kernel_has_configurations_for_both_dtypes() -> None:
    for kernel in KERNELS:
        for dtype in get_args(DType):
            assert configs(kernel, dtype)


def test_the_model_prefers_rows_for_few_tokens_and_tiles_for_many() -> None:
    spec = TreeSpec(trees=1, depth=12, leaf_width=1)
    assert predict.fastest(spec, 16, 768, "bf16") == "gather"
    assert predict.fastest(spec, 1 << 16, 768, "bf16") == "tiles"


def test_matrix_flops_of_the_masked_strategy_are_those_of_the_dense_product() -> None:
    """D 6, W 1: 64 lanes a tile for the nodes and 64 for the leaves, in and out: 2·2·N·128·d."""
    spec = TreeSpec(trees=3, depth=6, leaf_width=1)
    steps = predict.forward_steps(spec, 4096, 512, "bf16", "masked")
    assert sum(s.matrix_flops for s in steps) == 3 * 4 * 4096 * 128 * 512


def test_cache_bytes_of_the_gather_strategy_are_those_of_its_rows() -> None:
    """Each of N·K·(D + W) rows is read from w_in beside x, and from w_out; y is written once."""
    spec = TreeSpec(trees=2, depth=5, leaf_width=4)
    steps = [s for s in predict.forward_steps(spec, 256, 64, "fp32", "gather") if s.name != "activate"]
    assert sum(s.cache_bytes for s in steps) == 4 * 64 * (3 * 256 * 2 * 9 + 256)


def test_documented_predictions_are_the_models() -> None:
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    for table in (predict.counts_table(), predict.times_table()):
        assert table in page, "docs/kernels.md differs from `python -m ablate.kernels.triton.predict`"


def test_measurements_are_kept_and_found_by_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLATE_KERNEL_CACHE", str(tmp_path / "deep" / "kernels.json"))
    spec = TreeSpec(trees=1, depth=8, leaf_width=1)
    assert tuned.lookup("gpu", spec, 1000, 768, "bf16") is None
    tuned.record("gpu", spec, 1000, 768, "bf16", tuned.Entry("gather", {"row_dots": 1}, 1e-4))
    tuned.record("gpu", spec, 5000, 768, "bf16", tuned.Entry("tiles"))
    found = tuned.lookup("gpu", spec, 1024, 768, "bf16")
    assert found == tuned.Entry("gather", {"row_dots": 1}, 1e-4)
    assert tuned.lookup("gpu", spec, 1025, 768, "bf16") is None
    assert tuned.lookup("other gpu", spec, 1000, 768, "bf16") is None
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["kernels.json"]


@pytest.mark.parametrize("levels", [1, 15, 16, 18])
def test_tokens_are_sorted_at_any_depth(levels: int) -> None:
    codes = torch.tensor([[(1 << levels) - 1], [0], [1 << (levels - 1)]], dtype=torch.int32)
    order = sort_tokens(codes, levels)
    assert order.keys.tolist() == [sorted(codes[:, 0].tolist())]
    assert codes[order.perm[0].long(), 0].tolist() == order.keys[0].tolist()
