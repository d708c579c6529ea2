"""What a published study keeps of its usage table: the rows and columns that its figures and findings read."""

from __future__ import annotations

import polars as pl

from ablate.analysis import mechanism
from ablate.balance.usage import NORMS
from ablate.report.context import Context


def usage(c: Context) -> pl.DataFrame | None:
    """Return the rows of the held-out slice that are read, in their order, without the norms; None without a table.

    These are all evaluations of the trials that figures draw, one an arm (of a search's candidates only those that
    are drawn), and of every trial the evaluations that the analysis of the mechanism reads, where a study has one.
    """
    if c.tables.usage is None:
        return None
    table = c.tables.usage.filter(pl.col("window") == "held_out").drop(NORMS, strict=False)
    drawn = [row["trial"] for arm, row in c.first_trials.items() if arm in c.shown or c.kinds[arm] != "search"]
    evaluations = table.select("trial", "step").unique().sort("trial", "step").collect()
    read = pl.col("trial").is_in(drawn)
    if mechanism.applies(c.tables):
        place, count = pl.int_range(pl.len()).over("trial"), pl.len().over("trial")
        steps = [(place - (at if at >= 0 else count + at)) == 0 for at in mechanism.EVALUATIONS]
        read |= pl.col("trial").is_in(c.outcomes["trial"].to_list()) & pl.any_horizontal(steps)
    wanted = evaluations.filter(read).lazy()
    return table.join(wanted, on=["trial", "step"], how="semi", maintain_order="left").collect()
