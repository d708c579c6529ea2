"""The held-out slice window by window: means of each arm over its trials."""

from __future__ import annotations

import polars as pl

from ablate.results.columns import WINDOWS_TABLE_SCHEMA
from ablate.results.layout import WINDOWS, Layout


def window_table(layout: Layout, trials: pl.DataFrame) -> pl.DataFrame:
    """Return the columns of WINDOWS_TABLE_SCHEMA; rows in the order of the trials' arms, then of the text.

    Args:
        layout: where the trials' own tables are.
        trials: columns of TRIALS_SCHEMA.
    """
    ended = trials.filter((pl.col("status") == "finished") & (pl.col("kind") != "tune"))
    rows = ended.select("study", "trial", "arm", "kind").rows()
    there, folder = layout.names(), str(layout.results)
    present = [(*row, f"{folder}/{row[1]}.{WINDOWS}") for row in rows if f"{row[1]}.{WINDOWS}" in there]
    if not present:
        return pl.DataFrame(schema=WINDOWS_TABLE_SCHEMA)
    place = pl.LazyFrame(present, ["study", "trial", "arm", "kind", "file"], orient="row")
    order = {arm: i for i, arm in enumerate(dict.fromkeys(row[2] for row in present))}
    found = (
        pl.scan_parquet([row[-1] for row in present], include_file_paths="file")
        .join(place, on="file", how="left", maintain_order="left")
        .group_by("study", "arm", "kind", "window")
        # Sorted, so that a sum has one order of its terms.
        .agg(pl.col("bytes").max(), pl.col("bits").cast(pl.Float64).sort().mean(), trials=pl.len())
        .collect()
    )
    first = pl.col("arm").replace_strict(order, return_dtype=pl.Int64)
    return found.sort(first, "kind", "window").select(pl.col(n).cast(t) for n, t in WINDOWS_TABLE_SCHEMA.items())
