"""The usage table: one row per tree position and evaluation, the raw material of every balance metric."""

from __future__ import annotations

import polars as pl

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
