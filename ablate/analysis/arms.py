"""Arms: which runs count, which arm the others are compared with, and the straight reading of each one's balance."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import polars as pl

from ablate.analysis.frames import Tables
from ablate.config.endpoints import DEPTH, EQUIVALENT, RESTORED
from ablate.results.columns import FACTOR, QA

DEAD_TARGET = 0.01
PARTIAL = 0.5
DIP = 0.05  # n_eff_frac below both ends by more than this counts as a transient collapse
SEARCH_KINDS = ("search", "finalist")
CONTROLS = {
    "dense_total": "dense, equal total units",
    "dense_active": "dense, equal active units",
    "dense_none": "no feed-forward",
    "moe": "mixture of experts (load loss)",
}
STORY = (
    "n_eff_frac_start",
    "n_eff_frac_min",
    "n_eff_frac",
    "n_eff_frac_worst",
    "dead_frac_start",
    "dead_frac_max",
    "dead_frac",
    "pruned_frac",
    "revived_frac",
)
BALANCE = ("bits_lost", EQUIVALENT.name, "never_hit", "max_vio", "gini", "n_eff_ceiling", "informativeness")
COST = (
    "total_units",
    "active_units",
    "active_frac",
    "total_params",
    "active_params",
    "flops_per_token",
    "tokens",
    "seconds",
    "tokens_per_second",
)


def outcomes(tables: Tables, *, finalists: bool = False) -> pl.DataFrame:
    """Arms and controls whose runs ended on their own, ready for analysis (intention to treat).

    With `finalists`, a search's runs on fresh seeds as well; elsewhere they are left out, for a candidate's racing mean
    and its mean on fresh seeds are two things.

    A diverged run stays: its quality is the untrained model's (column `bpb_start`), for that is what its user is left with; its
    balance is the last one measured; its answers are at chance (scores without a chance level stay unknown). Pruned and
    killed runs never reached the end and are left out (see `exclusions`). Column n_eff_6 says bits_lost as n_eff_frac of
    depth 6.
    """
    frame = tables.evaluation(finalists=finalists).filter(pl.col("status").is_in(["finished", "diverged"]))
    lost = pl.col("status") == "diverged"
    last = [c for c in ("n_eff_frac", "dead_frac", "bits_lost", "collapse") if c in tables.history.columns]
    known = tables.history.sort("trial", "step").group_by("trial").agg(pl.col(c).drop_nulls().last() for c in last)
    frame = frame.join(known, on="trial", how="left", suffix="_last", maintain_order="left")
    frame = frame.with_columns(
        pl.when(lost).then(pl.coalesce(c, f"{c}_last")).otherwise(pl.col(c)).alias(c) for c in last
    ).drop(f"{c}_last" for c in last)
    frame = frame.with_columns((2.0 ** (-DEPTH * pl.col("bits_lost"))).alias(EQUIVALENT.name))
    quality = tables.study.quality
    guessed = [c for c in frame.columns if c.startswith(QA) and f"{c}/chance" in frame.columns]
    return frame.with_columns(
        pl.when(lost).then(pl.col(quality.start)).otherwise(pl.col(quality.name)).alias(quality.name),
        *(pl.when(lost).then(pl.col(f"{c}/chance").max()).otherwise(pl.col(c)).alias(c) for c in guessed),
    )


def exclusions(tables: Tables) -> list[dict[str, Any]]:
    """Every run that is left out of the comparisons, or kept although it failed, with the reason."""
    rows = []
    for r in tables.trials.filter(pl.col("status") != "finished").iter_rows(named=True):
        kept = r["status"] == "diverged" and r["kind"] != "tune"
        reason = {
            "diverged": f"diverged; kept, with the {tables.study.quality.short} of the untrained model"
            if kept
            else "diverged",
            "pruned": "stopped early by the pruner",
            "killed": "stopped before its end",
        }[r["status"]]
        rows.append(
            {k: r[k] for k in ("trial", "run_id", "arm", "kind", "seed", "status", "message")}
            | {"kept": kept, "reason": reason}
        )
    return rows


def reference_arm(tables: Tables) -> str | None:
    """The arm others are compared with: `reference`, else the one whose factors all have the base's values, else
    none.
    """
    arms = tables.trials.filter(pl.col("kind") == "arm")
    names = arms["arm"].unique().to_list()
    if "reference" in names:
        return "reference"
    base = tables.study.trial({})
    wanted = {f: base.value(f) for f in tables.factors}
    best: tuple[int, str] | None = None
    for row in arms.unique("arm", keep="first", maintain_order=True).iter_rows(named=True):
        if row["arm"] in tables.study.arms or not tables.factors:
            continue
        if all(_same(row[FACTOR + f], v) for f, v in wanted.items()):
            return str(row["arm"])
        # A grid that leaves the base's value out is compared with its first levels.
        rank = sum(_rank(tables, f, row[FACTOR + f]) for f in tables.factors)
        if best is None or rank < best[0]:
            best = (rank, str(row["arm"]))
    return best[1] if best else None


def _rank(tables: Tables, factor: str, level: Any) -> int:
    spec = tables.study.factors.get(factor)
    levels = spec.levels if spec and spec.levels else []
    return next((i for i, v in enumerate(levels) if _same(v, level)), len(levels))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return float(a) == float(b)
    return str(a) == str(b)


def labels(tables: Tables) -> dict[str, str]:
    """Short reading names of all arms: the levels of the factors that vary; an arm's own name where that says more."""
    out: dict[str, str] = {}
    factors = tables.factors
    text_levels: dict[str, int] = {}
    for f in factors:
        for v in tables.trials[FACTOR + f].drop_nulls().unique().to_list():
            if isinstance(v, str):
                text_levels[v] = text_levels.get(v, 0) + 1
    for row in tables.trials.unique("arm", keep="first", maintain_order=True).iter_rows(named=True):
        arm = str(row["arm"])
        if row["kind"] == "control":
            control, _, own = arm.partition(" ")
            out[arm] = ", ".join(filter(None, (CONTROLS.get(control, control), own.replace("=", " "))))
        elif arm == "reference" or arm in tables.study.arms or row["kind"] in SEARCH_KINDS or not factors:
            out[arm] = arm
        else:
            out[arm] = ", ".join(_level(f, row[FACTOR + f], text_levels) for f in factors)
    counts: dict[str, int] = {}
    for label in out.values():
        counts[label] = counts.get(label, 0) + 1
    return {arm: label if counts[label] == 1 else arm for arm, label in out.items()}


def _level(factor: str, value: Any, text_levels: dict[str, int]) -> str:
    name = factor.partition(".")[2]
    if (
        isinstance(value, str)
        and text_levels.get(value) == 1
        and value not in {"raw", "own", "on", "off", "all", "none"}
    ):
        return value
    return f"{name} {level_text(value)}"


def level_text(value: Any) -> str:
    """A factor's level as a reader writes it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def order(tables: Tables) -> list[str]:
    """All arms and controls in reading order: the reference, the grid in the file's order of levels, named arms,
    controls.
    """
    reference = reference_arm(tables)
    first = tables.evaluation().unique("arm", keep="first", maintain_order=True)
    rows = list(first.iter_rows(named=True))
    factors, named = tables.factors, list(tables.study.arms)

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        arm = str(row["arm"])
        group = 0 if arm == reference else 3 if row["kind"] == "control" else 2 if arm in named else 1
        ranks = tuple(_rank(tables, f, row[FACTOR + f]) for f in factors) if group == 1 else ()
        return group, named.index(arm) if arm in named else 0, ranks, arm

    return [str(r["arm"]) for r in sorted(rows, key=key)]


def summaries(tables: Tables) -> list[dict[str, Any]]:
    """One record an arm: runs, quality, the balance story at birth, at its worst and at the end, its class and a
    sentence.
    """
    frame, names = outcomes(tables), labels(tables)
    reference = reference_arm(tables)
    numbers = (tables.study.quality.name, *STORY, *BALANCE)
    means = (*COST, "born_dead_frac", "never_alive_frac", "lr")
    every = grouped(tables.evaluation(), ["kind", "status", *(FACTOR + f for f in tables.factors)])
    ended = grouped(frame.sort("arm", "seed"), ["seed", "run_id", *numbers, *means])
    nothing: dict[str, list[Any]] = {c: [] for c in ("seed", "run_id", *numbers, *means)}
    asked = grouped(frame.sort("arm", "seed"), [c for c in frame.columns if c.startswith(QA)])
    out = []
    for arm in order(tables):
        runs, rows = every[arm], ended.get(arm, nothing)
        record: dict[str, Any] = {
            "arm": arm,
            "label": names[arm],
            "kind": runs["kind"][0],
            "reference": arm == reference,
            "factors": {f: runs[FACTOR + f][0] for f in tables.factors},
            "n": len(rows["seed"]),
            "seeds": rows["seed"],
            "run_ids": rows["run_id"],
            "statuses": {s: runs["status"].count(s) for s in sorted(set(runs["status"]))},
            **{c: spread(rows[c]) for c in numbers},
            **{c: mean(rows[c]) for c in means},
            "scores": {c: found for c, values in asked.get(arm, {}).items() if (found := spread(values))},
        }
        record["signs"] = signs(record)
        record["reading"] = reading(record)
        out.append(record)
    return out


def grouped(frame: pl.DataFrame, columns: list[str]) -> dict[str, dict[str, list[Any]]]:
    """Plain lists by arm and column; thousands of arms are too many for a frame each."""
    out: dict[str, dict[str, list[Any]]] = {}
    for arm, *values in frame.select("arm", *columns).iter_rows():
        lists = out.setdefault(arm, {c: [] for c in columns})
        for c, v in zip(columns, values, strict=True):
            lists[c].append(v)
    return out


def spread(values: list[float | None]) -> dict[str, Any] | None:
    """Mean, smallest and largest over seeds; None where nothing was measured."""
    x = [v for v in values if v is not None]
    return {"mean": fmean(x), "min": min(x), "max": max(x), "n": len(x)} if x else None


def mean(values: list[float | None]) -> float | None:
    """Mean over seeds; None where nothing was measured."""
    x = [v for v in values if v is not None]
    return fmean(x) if x else None


def signs(record: dict[str, Any]) -> list[str]:
    """Which of the three troubles an arm shows, from its means: born_imbalanced, dips, self_prunes; and how it ended."""
    m = {c: record[c]["mean"] for c in STORY if record[c]}
    if "n_eff_frac" not in m:
        return []
    out = []
    start = m.get("n_eff_frac_start")
    if start is not None and start < RESTORED:
        out.append("born_imbalanced")
    low = m.get("n_eff_frac_min")
    if start is not None and low is not None and low < min(start, m["n_eff_frac"]) - DIP:
        out.append("dips")
    if m.get("pruned_frac", 0.0) > DEAD_TARGET:
        out.append("self_prunes")
    balanced = m["n_eff_frac"] >= RESTORED and m.get("dead_frac", 1.0) <= DEAD_TARGET
    out.append(
        "ends_balanced" if balanced else "ends_partly_balanced" if m["n_eff_frac"] >= PARTIAL else "ends_imbalanced"
    )
    return out


def reading(record: dict[str, Any]) -> str:
    """Two or three plain sentences that say what the numbers say, imbalance at birth, dip and self-pruning told
    apart.
    """
    if not record["n"]:
        return "No run of this arm came to an end."
    if not record["n_eff_frac"]:
        return "" if record["kind"] == "control" else "Balance was not measured."
    m = {c: record[c]["mean"] for c in STORY if record[c]}
    parts = []
    if "n_eff_frac_start" in m:
        born = "Born imbalanced" if "born_imbalanced" in record["signs"] else "Born balanced"
        dead = f", {_percent(m['dead_frac_start'])} of leaves dead" if "dead_frac_start" in m else ""
        parts.append(f"{born}: {m['n_eff_frac_start']:.2f} of the leaves in effective use at step 0{dead}.")
    if "n_eff_frac_min" in m:
        if "dips" in record["signs"]:
            worst = f" ({_percent(m['dead_frac_max'])} dead at the worst)" if "dead_frac_max" in m else ""
            parts.append(
                f"Training first takes it down to {m['n_eff_frac_min']:.2f}{worst}; then part of it comes back."
            )
        elif m["n_eff_frac_min"] < m["n_eff_frac"] - DIP:
            parts.append("No transient collapse beyond the start.")
    end = {
        "ends_balanced": "Ends balanced",
        "ends_partly_balanced": "Ends partly balanced",
        "ends_imbalanced": "Ends imbalanced",
    }[record["signs"][-1]]
    change = m["n_eff_frac"] - m["n_eff_frac_start"] if "n_eff_frac_start" in m else None
    trend = ""
    if change is not None:
        trend = (
            ", better than at birth" if change > DIP else ", worse than at birth" if change < -DIP else ", as at birth"
        )
    dead = f", {_percent(m['dead_frac'])} dead" if "dead_frac" in m else ""
    parts.append(f"{end}{trend}: {m['n_eff_frac']:.2f}{dead}.")
    if "pruned_frac" in m:
        pruned = m["pruned_frac"]
        tail = (
            f"Self-pruning: {_percent(pruned)} of all leaves were alive at step 0, died and stayed dead."
            if "self_prunes" in record["signs"]
            else f"Hardly any self-pruning ({_percent(pruned)} of all leaves alive at step 0 died and stayed dead)."
        )
        parts.append(tail)
    failed = record["statuses"].get("diverged", 0)
    if failed:
        parts.append(f"{failed} of {sum(record['statuses'].values())} runs diverged.")
    return " ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"
