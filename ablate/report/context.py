"""What every view draws from: tables, findings, names and marks, and the leaf usage of the arms that are shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ablate.analysis import arms
from ablate.analysis.families import drawn_balance
from ablate.analysis.frames import Tables
from ablate.config.endpoints import Endpoint
from ablate.report.style import Styles, assign, assign_leading

LEADING = 6  # candidates of a search with marks of their own
PANELS = 16  # arms drawn as small multiples; the choice is named where there are more


@dataclass(frozen=True)
class Usage:
    """One trial's usage on the held-out slice."""

    arm: str
    trial: str
    run_id: str
    seed: int
    steps: list[int]
    leaves: NDArray[np.int64]
    """Counts [S, layers, K, L]."""
    nodes: NDArray[np.int64]
    """Counts [S, layers, K, M], heap order."""
    skew: NDArray[np.float64]
    """Gradient skew [S, layers, K, M]; NaN where unknown."""
    offset: NDArray[np.float64]
    """Router offset, likewise."""

    @property
    def depth(self) -> int:
        """D."""
        return int(self.leaves.shape[-1]).bit_length() - 1


@dataclass(frozen=True)
class Context:
    """Everything a view may use."""

    tables: Tables
    findings: dict[str, Any]
    address: str | None = None
    """MLflow's address for links to runs."""

    @property
    def quality(self) -> Endpoint:
        """The endpoint that says how good a trained model is."""
        return self.tables.study.quality

    @property
    def balance(self) -> Endpoint:
        """The balance that arms are drawn and ranked by."""
        return drawn_balance(self.tables.study)

    @cached_property
    def order(self) -> list[str]:
        """Arms and controls in reading order."""
        return [a["arm"] for a in self.findings["arms"]]

    @cached_property
    def labels(self) -> dict[str, str]:
        """Reading names."""
        return {a["arm"]: a["label"] for a in self.findings["arms"]}

    @cached_property
    def kinds(self) -> dict[str, str]:
        """arm, control or search."""
        return {a["arm"]: a["kind"] for a in self.findings["arms"]}

    @cached_property
    def styles(self) -> Styles:
        """Marks of all arms."""
        if self.findings["design"] == "search":
            return assign_leading(self.leading, self.order)
        return assign(self.tables, self.order, self.labels)

    @cached_property
    def leading(self) -> list[str]:
        """The best candidates of a search, which have marks of their own in every figure; empty for other designs."""
        ranked = [r for r in self.findings.get("search", {}).get("candidates", []) if r["rank"] is not None]
        return [r["arm"] for r in ranked[:LEADING]]

    @cached_property
    def outcomes(self) -> pl.DataFrame:
        """Runs that count."""
        return arms.outcomes(self.tables)

    @cached_property
    def history(self) -> pl.DataFrame:
        """Evaluations of all trials but those that tune a learning rate."""
        return self.tables.history.filter(pl.col("kind") != "tune")

    @cached_property
    def finished(self) -> pl.DataFrame:
        """Runs that reached their end and whose quality is known."""
        return self.outcomes.filter(pl.col(self.quality.name).is_not_null() & (pl.col("status") == "finished"))

    @cached_property
    def trees(self) -> list[str]:
        """Arms with balance, in reading order."""
        return [a["arm"] for a in self.findings["arms"] if a["n_eff_frac"]]

    @cached_property
    def shown(self) -> list[str]:
        """Tree arms drawn one by one: all, or the reference, the named ones and an even choice over n_eff_frac.

        Of a search, the best candidates.
        """
        if self.leading:
            return [a for a in self.trees if a in self.leading]
        if len(self.trees) <= PANELS:
            return self.trees
        records = {a["arm"]: a for a in self.findings["arms"]}
        kept = [a for a in self.trees if records[a]["reference"] or a in self.tables.study.arms][: PANELS // 2]
        rest = sorted((a for a in self.trees if a not in kept), key=lambda a: (records[a]["n_eff_frac"]["mean"], a))
        places = np.unique(np.linspace(0, len(rest) - 1, PANELS - len(kept)).round().astype(int))
        chosen = {*kept, *(rest[i] for i in places)}
        return [a for a in self.trees if a in chosen]

    @cached_property
    def choice(self) -> str:
        """A sentence on which arms are drawn, empty where all are."""
        if len(self.shown) == len(self.trees):
            return ""
        if self.leading:
            return f"Drawn: the {len(self.shown)} best of {len(self.trees)} candidates; all of them are in the tables."
        return (
            f"Drawn: {len(self.shown)} of {len(self.trees)} arms (the reference, named arms and an even choice over "
            "n_eff_frac); all of them are in the tables."
        )

    @cached_property
    def first_trials(self) -> dict[str, dict[str, Any]]:
        """For each arm, its first seed's trial: of those that did not diverge, where there is one."""
        picked: dict[str, dict[str, Any]] = {}
        for row in self.outcomes.sort("arm", pl.col("status") == "diverged", "seed").iter_rows(named=True):
            picked.setdefault(row["arm"], row)
        return picked

    @cached_property
    def usage(self) -> dict[str, Usage]:
        """For each drawn arm, the usage of its first seed's trial."""
        if self.tables.usage is None:
            return {}
        picked = {arm: row for arm, row in self.first_trials.items() if arm in self.shown}
        wanted = [r["trial"] for r in picked.values()]
        held_out = (pl.col("window") == "held_out") & pl.col("trial").is_in(wanted)
        columns = ["trial", "step", "layer", "tree", "level", "index", "count", "skew", "offset"]
        frame = self.tables.usage.filter(held_out).select(columns).collect()
        parts = {key[0]: part for key, part in frame.partition_by("trial", as_dict=True).items()}
        return {
            a: arrays(picked[a], parts[picked[a]["trial"]])
            for a in self.shown
            if a in picked and picked[a]["trial"] in parts
        }


def arrays(row: dict[str, Any], frame: pl.DataFrame) -> Usage:
    """One trial's usage rows as arrays; positions without a row count 0."""
    steps = frame["step"].unique().sort().to_list()
    layers, trees = int(frame["layer"].max() or 0) + 1, int(frame["tree"].max() or 0) + 1  # type: ignore[arg-type]
    depth = int(frame["level"].max() or 0)  # type: ignore[arg-type]
    slots = 2 ** (depth + 1) - 1
    heap = (2 ** frame["level"].cast(pl.Int64).to_numpy() - 1) + frame["index"].to_numpy()
    at = (np.searchsorted(steps, frame["step"].to_numpy()), frame["layer"].to_numpy(), frame["tree"].to_numpy(), heap)
    shape = (len(steps), layers, trees, slots)
    counts = np.zeros(shape, dtype=np.int64)
    counts[at] = frame["count"].to_numpy()
    values = []
    for column in ("skew", "offset"):
        out = np.full(shape, np.nan)
        out[at] = frame[column].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        values.append(out[..., : 2**depth - 1])
    inner = 2**depth - 1
    return Usage(
        row["arm"], row["trial"], row["run_id"], row["seed"], steps, counts[..., inner:], counts[..., :inner], *values
    )
