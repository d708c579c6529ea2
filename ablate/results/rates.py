"""What tuning learning rates showed: one row a rate that an arm tried, from the table of trials and the plan."""

from __future__ import annotations

from typing import Any

import polars as pl

from ablate.config.endpoints import BPB, ENDPOINTS
from ablate.results.columns import RATES_SCHEMA


def rate_table(trials: pl.DataFrame, plan: dict[str, Any]) -> pl.DataFrame:
    """Return the columns of RATES_SCHEMA; rows in the order of the trials' arms, then by rate.

    Args:
        trials: columns of TRIALS_SCHEMA.
        plan: plan.json; what it does not say of an arm (its tuning goes on) is null.
    """
    ended = (pl.col("status") == "finished") & pl.col(BPB.name).is_not_null()
    means = [pl.col(name).mean() for name in ENDPOINTS if name != BPB.name]
    rows = (
        trials.filter((pl.col("kind") == "tune") & pl.col("lr").is_not_null())
        .group_by("study", "arm", "lr", maintain_order=True)
        .agg(*means, pl.col(BPB.name).mean(), trials=pl.len(), diverged=(~ended).sum())
        .with_columns(pl.when(pl.col("diverged") == 0).then(pl.col(BPB.name)).alias(BPB.name))
    )
    known = [
        {"arm": arm, "lr": tried["lr"], "round": tried.get("round", 0), "best": found["lr"], "bound": found["at_edge"]}
        for arm, found in (plan.get("tuned") or {}).items()
        for tried in found["tried"]
    ]
    schema = {"arm": pl.String(), "lr": pl.Float64(), "round": pl.Int64(), "best": pl.Float64(), "bound": pl.Boolean()}
    joined = rows.join(pl.DataFrame(known, schema), on=["arm", "lr"], how="left", maintain_order="left")
    joined = joined.with_columns(chosen=pl.col("lr") == pl.col("best"))
    joined = joined.with_columns(bound=pl.col("chosen") & pl.col("bound"))
    place = {arm: i for i, arm in enumerate(joined["arm"].unique(maintain_order=True))}
    order = pl.col("arm").replace_strict(place, return_dtype=pl.Int64)
    return joined.sort(order, "lr").select(pl.col(name).cast(dtype) for name, dtype in RATES_SCHEMA.items())
