"""The few curves and effects that `dvc plots show` and `dvc plots diff` draw, as CSV."""

from __future__ import annotations

import polars as pl

from ablate.config.endpoints import N_EFF
from ablate.report.context import Context

LATE = 0.3  # of the training; before it all curves fall steeply and lie on each other
EFFECTS = 30  # comparisons an endpoint has at most


def frames(c: Context) -> dict[str, pl.DataFrame]:
    """Return tables by file name: quality and balance over training (means over seeds), and effects with their intervals."""
    quality = _curve(c, c.quality.name, LATE).rename(
        {c.quality.name: "quality"}
    )  # one name for dvc.yaml, whatever the task
    return {"quality": quality, "balance": _curve(c, N_EFF.name), "effects": _effects(c)}


def _curve(c: Context, column: str, since: float = 0) -> pl.DataFrame:
    """Columns arm (its reading name), step, the value, and n, from a share of the training on."""
    drawn = [a for a in c.order if a in c.shown or c.kinds[a] == "control"]
    history = c.history.filter(pl.col("arm").is_in(drawn))
    history = history.filter(pl.col("step") >= since * pl.col("step").max())
    means = history.drop_nulls(column).group_by("arm", "step").agg(pl.col(column).mean(), pl.len().alias("n"))
    names = pl.col("arm").replace_strict(c.labels, return_dtype=pl.String)
    return means.sort("arm", "step").with_columns(names, pl.col("step").cast(pl.Int64))


def _effects(c: Context) -> pl.DataFrame:
    """Columns comparison, endpoint, effect, low, high, verdict; the largest where there are many."""
    schema = {"comparison": pl.String(), "endpoint": pl.String(), "effect": pl.Float64(), "low": pl.Float64()}
    rows = [
        {
            "comparison": f"{f['arm_label']} vs {f['reference_label']}",
            "endpoint": f["endpoint"],
            "effect": f["effect"],
            "low": f["interval"][0],
            "high": f["interval"][1],
            "verdict": f["verdict"],
        }
        for f in c.findings["findings"]
        if f["effect"] is not None and f["interval"] is not None
    ]
    frame = pl.DataFrame(rows, schema | {"high": pl.Float64(), "verdict": pl.String()})
    largest = pl.col("effect").abs().rank("ordinal", descending=True).over("endpoint") <= EFFECTS
    return frame.filter(largest)
