"""The usage table: one row per tree position and evaluation, the raw material of every balance metric."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from ablate.balance.metrics import depth_of, node_counts

Window = Literal["held_out", "train"]

USAGE_SCHEMA: dict[str, pl.DataType] = {
    "step": pl.Int32(),
    "window": pl.String(),  # held_out: the fixed evaluation slice; train: tokens since the last evaluation
    "layer": pl.Int16(),
    "tree": pl.Int16(),
    "level": pl.Int8(),  # 0 the root ... D - 1 the last nodes, D the leaves
    "index": pl.Int32(),  # position within the level, left to right
    "count": pl.Int64(),  # tokens that reached it
    "skew": pl.Float32(),  # gradient skew of a node; null below 30 tokens a side, for leaves and for window train
    "offset": pl.Float32(),  # router offset of a node: abs(mean(z - t)) / sd(z); null likewise
    "in_norm": pl.Float32(),  # L2 norm of the position's w_in rows
    "out_norm": pl.Float32(),  # same for w_out; null where nodes have none
}


def rows(
    step: int,
    window: Window,
    counts: ArrayLike,
    *,
    skew: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    in_norm: ArrayLike | None = None,
    out_norm: ArrayLike | None = None,
) -> pl.DataFrame:
    """One evaluation as rows of USAGE_SCHEMA, from leaf counts int [layers, K, L].

    `skew`, `offset` [layers, K, M] and the norms [layers, K, M + L] are in heap order; NaN becomes null, as does an
    array not given. Rows are ordered by layer, tree, level and index.
    """
    c = np.asarray(counts)
    layers, trees, leaves = c.shape
    depth, positions = depth_of(leaves), 2 * leaves - 1
    size = layers * trees * positions
    level = np.concatenate([np.full(1 << d, d) for d in range(depth + 1)])
    index = np.arange(positions) - ((1 << level) - 1)
    columns: dict[str, Any] = {
        "step": np.full(size, step),
        "window": [window] * size,
        "layer": np.repeat(np.arange(layers), trees * positions),
        "tree": np.tile(np.repeat(np.arange(trees), positions), layers),
        "level": np.tile(level, layers * trees),
        "index": np.tile(index, layers * trees),
        "count": np.concatenate(node_counts(c), axis=-1).ravel(),
    }
    for name, values in {"skew": skew, "offset": offset, "in_norm": in_norm, "out_norm": out_norm}.items():
        columns[name] = _heap_column(name, values, (layers, trees, leaves - 1, positions))
    return pl.DataFrame(columns, schema=USAGE_SCHEMA, strict=False).with_columns(
        pl.col("skew", "offset", "in_norm", "out_norm").fill_nan(None)
    )


def counts_from(frame: pl.DataFrame, window: Window = "held_out") -> NDArray[np.int64]:
    """Leaf counts int64 [steps, layers, K, L] of one trial's usage table, steps ascending (see `steps_of`).

    Raises ValueError where rows are missing or doubled.
    """
    leaves = frame.filter((pl.col("window") == window) & (pl.col("level") == pl.col("level").max()))
    return _cube(leaves, "count").astype(np.int64)


def nodes_from(frame: pl.DataFrame, column: str, window: Window = "held_out") -> NDArray[np.float64]:
    """A column of the nodes, float64 [steps, layers, K, M] in heap order, null as NaN; M = 0 without nodes."""
    used = frame.filter(pl.col("window") == window)
    nodes = used.filter(pl.col("level") < pl.col("level").max())
    if nodes.is_empty():
        steps, layers, trees, _ = _cube(used, "count").shape
        return np.empty((steps, layers, trees, 0))
    return _cube(nodes, column).astype(np.float64)


def steps_of(frame: pl.DataFrame, window: Window = "held_out") -> NDArray[np.int64]:
    """The steps of one trial's evaluations, ascending: the first axis of `counts_from`."""
    return np.unique(frame.filter(pl.col("window") == window)["step"].to_numpy()).astype(np.int64)


def _heap_column(name: str, values: ArrayLike | None, shape: tuple[int, int, int, int]) -> NDArray[np.float64] | None:
    """A heap-ordered array padded with NaN over the leaves where it has nodes only, flat."""
    if values is None:
        return None
    layers, trees, nodes, positions = shape
    v = np.asarray(values, dtype=np.float64)
    if v.shape not in {(layers, trees, nodes), (layers, trees, positions)}:
        raise ValueError(
            f"{name} has shape {v.shape}, expected {(layers, trees, nodes)} or {(layers, trees, positions)}"
        )
    return np.pad(v, ((0, 0), (0, 0), (0, positions - v.shape[-1])), constant_values=np.nan).ravel()


def _cube(frame: pl.DataFrame, column: str) -> NDArray[Any]:
    keys = ["step", "layer", "tree", "level", "index"]
    ordered = frame.sort(keys)
    sizes = [ordered[key].n_unique() for key in keys[:3]]
    positions = ordered.select(pl.struct("level", "index").n_unique()).item()
    if len(ordered) != np.prod([*sizes, positions]) or ordered.select(pl.struct(keys).n_unique()).item() != len(
        ordered
    ):
        raise ValueError(
            f"usage table has {len(ordered)} rows for steps, layers, trees, positions {(*sizes, positions)}"
        )
    return ordered[column].to_numpy().reshape(*sizes, positions)
