from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from ablate.balance.usage import USAGE_SCHEMA, counts_from, nodes_from, rows, steps_of


def table(depth: int = 3) -> tuple[pl.DataFrame, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(depth)
    leaves = 1 << depth
    counts = rng.integers(0, 100, (4, 2, 3, leaves))
    skew = rng.normal(size=(4, 2, 3, leaves - 1))
    skew[rng.random(skew.shape) < 0.2] = np.nan
    norms = rng.random((2, 3, 2 * leaves - 1))
    frames = [
        rows(step, "held_out", counts[i], skew=skew[i], in_norm=norms, out_norm=norms)
        for i, step in enumerate((0, 50, 100, 120))
    ]
    return pl.concat([*frames, rows(50, "train", counts[0])]), counts, skew


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_counts_and_nodes_come_back_as_they_went_in(depth: int) -> None:
    frame, counts, skew = table(depth)
    shuffled = frame.sample(fraction=1, shuffle=True, seed=0)
    assert dict(frame.schema) == USAGE_SCHEMA
    np.testing.assert_array_equal(counts_from(shuffled), counts)
    np.testing.assert_array_equal(counts_from(shuffled, "train"), counts[:1])
    np.testing.assert_allclose(nodes_from(shuffled, "skew"), skew.astype(np.float32), rtol=1e-6)
    assert steps_of(shuffled).tolist() == [0, 50, 100, 120]


def test_rows_are_one_per_position_with_nulls_where_nothing_is_known() -> None:
    frame, counts, skew = table()
    root = frame.filter((pl.col("level") == 0) & (pl.col("window") == "held_out"))
    assert root["count"].to_list() == counts.sum(-1).ravel().tolist()
    assert frame.filter(pl.col("level") == 3)["skew"].null_count() == len(frame.filter(pl.col("level") == 3))
    assert frame["skew"].null_count() == np.isnan(skew).sum() + 4 * 6 * 8 + 6 * 15
    assert frame["skew"].is_nan().sum() == 0
    assert frame["offset"].null_count() == len(frame)
    # Heap order: the right child of the root is position 1 of level 1.
    position = frame.filter(pl.col("step") == 100, pl.col("layer") == 1, pl.col("tree") == 2, level=1, index=1)
    assert position["count"].to_list() == [counts[2, 1, 2, 4:].sum()]


def test_a_table_with_missing_or_doubled_rows_is_refused() -> None:
    frame, _, _ = table()
    with pytest.raises(ValueError, match="rows for steps"):
        counts_from(frame.filter(~((pl.col("step") == 50) & (pl.col("layer") == 1))))
    with pytest.raises(ValueError, match="rows for steps"):
        counts_from(pl.concat([frame, frame]))


def test_arrays_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="skew has shape"):
        rows(0, "held_out", np.ones((1, 1, 4)), skew=np.ones((1, 1, 2)))
