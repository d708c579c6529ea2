"""The usage table: one row per tree position and evaluation, the raw material of every balance metric."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from ablate.balance.metrics import depth_of, node_counts, saturation
from ablate.files import replacing
from ablate.results.layout import MOTION, TREES, USAGE

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
    "offset": pl.Float32(),  # router offset of a node: abs(mean(z - t)) / sd(z); null where under 30 tokens reach it
    "in_norm": pl.Float32(),  # L2 norm of the position's w_in rows
    "out_norm": pl.Float32(),  # same for w_out; null where nodes have none
}

NORMS = ("in_norm", "out_norm")
"""Columns that reports do not read: the usage tables of published studies lack them."""

TREES_SCHEMA: dict[str, pl.DataType] = {
    "step": pl.Int32(),
    "layer": pl.Int16(),
    "tree": pl.Int16(),
    "flip_rate": pl.Float32(),  # against the evaluation before; null at the first
    "saturation": pl.Float32(),  # chance-corrected agreement with the last evaluation
    "informativeness": pl.Float32(),
    "informativeness_shuffled": pl.Float32(),
    "ceiling": pl.Float32(),  # n_eff_frac that median thresholds would give on this data
    "path_asymmetry": pl.Float32(),  # G on the layer's actual z
    "grad_skew": pl.Float32(),  # mean over nodes, by traffic
    "router_offset": pl.Float32(),  # mean over nodes, by traffic
    "in_norm_dead": pl.Float32(),  # mean norm of the w_in rows of dead leaves
    "in_norm_alive": pl.Float32(),
}
"""The tree table: one row per evaluation, layer and tree, from the fixed probe tokens."""

MOTION_SCHEMA: dict[str, pl.DataType] = {
    "step": pl.Int32(),  # the later evaluation
    "since": pl.Int32(),  # the earlier one
    "layer": pl.Int16(),
    "tree": pl.Int16(),
    "level": pl.Int8(),
    "index": pl.Int32(),  # position within the level, left to right
    "tokens": pl.Int64(),  # probe tokens that reached the node at the earlier evaluation; all means are over these
    "right": pl.Float64(),  # share of them with z > t at the earlier evaluation
    "right_after": pl.Float64(),  # and at the later one
    "sd": pl.Float64(),  # of z - t at the earlier evaluation
    "change": pl.Float64(),  # mean of z' - z; router + drift
    "router": pl.Float64(),  # mean of the router's part
    "drift": pl.Float64(),  # mean of the representation's part
    "router_rms": pl.Float64(),  # root mean square over tokens
    "drift_rms": pl.Float64(),
}
"""The motion table: a row per evaluation and node that probe tokens reached (balance.motion)."""


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


def tree_rows(step: int, values: Mapping[str, NDArray[np.float64]]) -> pl.DataFrame:
    """One evaluation as rows of TREES_SCHEMA, from arrays [layers, K] by column; null for NaN and what is not given."""
    layers, trees = next(iter(values.values())).shape
    layer, tree = np.indices((layers, trees)).reshape(2, -1)
    columns: dict[str, Any] = {"step": np.full(layer.size, step), "layer": layer, "tree": tree}
    columns |= {name: values[name].ravel() if name in values else None for name in TREES_SCHEMA if name not in columns}
    frame = pl.DataFrame(columns, schema=TREES_SCHEMA, strict=False)
    return frame.with_columns(pl.col(pl.Float32).fill_nan(None))


def with_saturation(frame: pl.DataFrame, leaves: Mapping[int, NDArray[np.integer[Any]]], width: int) -> pl.DataFrame:
    """The tree table with `saturation` filled in: agreement with the last step's leaves, by step int [layers, K, P].

    `width` is L.
    """
    last = leaves[max(leaves)]
    parts = [tree_rows(step, {"saturation": saturation(taken, last, width)}) for step, taken in leaves.items()]
    filled = pl.concat(parts).select("step", "layer", "tree", "saturation")
    return frame.drop("saturation").join(filled, on=["step", "layer", "tree"], how="left").select(list(TREES_SCHEMA))


class UsageParts:
    """A running trial's tables on disk, a part per evaluation, so that an interrupted run loses none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        """SHA-256 of each part that was written, by file name; a resumed run is given those of its checkpoint."""

    def write(
        self,
        step: int,
        usage: pl.DataFrame,
        trees: pl.DataFrame,
        leaves: NDArray[np.int16],
        motion: pl.DataFrame | None = None,
    ) -> None:
        """Keep one evaluation: rows of the tables and the probe tokens' leaves [layers, K, P]."""
        parts: dict[str, Callable[[Any], object]] = {
            USAGE: usage.write_parquet,
            TREES: trees.write_parquet,
            "leaves.npy": lambda file: np.save(file, leaves),
        }
        if motion is not None:
            parts[MOTION] = motion.write_parquet
        for kind, save in parts.items():
            path = self._part(step, kind)
            with replacing(path) as partial:
                with partial.open("wb") as file:
                    save(file)
                self.digests[path.name] = hashlib.sha256(partial.read_bytes()).hexdigest()

    def damaged(self, digests: Mapping[str, str]) -> str:
        """Return the name of a part that is missing or not what it was, empty where all are whole."""
        for name, digest in digests.items():
            path = self.folder / name
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                return name
        return ""

    def usage(self, steps: Sequence[int]) -> pl.DataFrame:
        """The usage table of these evaluations; empty where a model has no trees."""
        return self._table(steps, USAGE, USAGE_SCHEMA)

    def trees(self, steps: Sequence[int], width: int, *, since: int = 0) -> pl.DataFrame:
        """The tree table of these evaluations, saturation against the last of them included; `width` is L.

        Evaluations before step `since` had other probe tokens: their saturation is unknown.
        """
        table = self._table(steps, TREES, TREES_SCHEMA)
        leaves = {step: taken for step in steps if step >= since and (taken := self.leaves(step)) is not None}
        return with_saturation(table, leaves, width) if leaves else table

    def motion(self, steps: Sequence[int]) -> pl.DataFrame:
        """The motion table of these evaluations (balance.motion)."""
        return self._table(steps, MOTION, MOTION_SCHEMA)

    def leaves(self, step: int) -> NDArray[np.int16] | None:
        """The probe tokens' leaves at an evaluation; None where it kept none."""
        part = self._part(step, "leaves.npy")
        return np.load(part) if part.exists() else None

    def _table(self, steps: Sequence[int], kind: str, schema: dict[str, pl.DataType]) -> pl.DataFrame:
        parts = [self._part(step, kind) for step in steps]
        return pl.concat(
            [pl.DataFrame(schema=schema), *(pl.read_parquet(part, glob=False) for part in parts if part.exists())]
        )

    def _part(self, step: int, kind: str) -> Path:
        return self.folder / f"{step:08d}.{kind}"


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
