"""`collect`: a study's results as tables. It reads results/, never MLflow, so the tables need no server."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl
from pydantic_core import from_json

from ablate.config import ConfigError
from ablate.evaluation.scores import Score, columns
from ablate.files import clear_stale, replacing
from ablate.results import layout as files
from ablate.results.columns import (
    BALANCE,
    COST,
    DEAD,
    FACTOR,
    HISTORY_SCHEMA,
    MAGNITUDE,
    MOTION_TABLE_SCHEMA,
    PRUNE_SCHEMA,
    QA,
    RANDOM,
    ROUTING,
    STARTS,
    TASK,
    TREE_MEANS,
    TREES_TABLE_SCHEMA,
    TRIALS_SCHEMA,
    USAGE_TABLE_SCHEMA,
)
from ablate.results.intact import problems
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.results.rates import rate_table
from ablate.results.record import read_record
from ablate.results.windows import window_table

_ROUTING = {name + end for name in ROUTING for end in ("", "_worst")}
REQUIRED_PRUNE = {"threshold", "units_before", "units_after", "bpb_before", "bpb_after", "controls"}
ROW_GROUP = 1_000_000
_STREAMED = {files.USAGE: USAGE_TABLE_SCHEMA, files.TREES: TREES_TABLE_SCHEMA, files.MOTION: MOTION_TABLE_SCHEMA}


def collect(study: str, root: Path) -> Path:
    """Write tables/<study>/{trials,history,usage,trees,motion,prune,rates,windows}.parquet from results/<study>/; same results, same bytes.

    Rows are in the plan's order (a search's in the order of its trials' hashes). Results of an earlier plan that are
    no longer part of it are left out. prune.parquet is there only where a trial was pruned, rates.parquet where learning
    rates were tuned, windows.parquet where trials kept the windows of their last evaluation.

    Raises:
        ConfigError: there is no plan or no result yet, or a result file is damaged.
    """
    layout = Layout(root, study)
    plan = load_plan(layout)
    if plan is None:
        raise ConfigError(f"study {study!r} has no results: run `ablate study run studies/{study}.yaml` first")
    order = _order(layout, plan)
    if not order:
        raise ConfigError(
            f"study {study!r} has no finished trial yet: run `ablate study run studies/{study}.yaml` first"
        )
    for damaged in problems(layout, order).values():
        raise ConfigError(
            f"{damaged.what} {str(damaged.path)!r}: `ablate doctor --fix` sets it aside, and the study's next run trains it again"
        )
    keys = list(dict.fromkeys(key for known in order.values() for key in known["factors"]))
    trials: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    pruned: list[dict[str, Any]] = []
    prunes = layout.prunes()
    for name, known in order.items():
        record = read_record(layout.record(name))
        place = {"study": study, "trial": name, **{key: known[key] for key in ("arm", "kind", "seed")}}
        trials.append(
            place | trial_row(record) | _tuned(plan, known) | {FACTOR + k: known["factors"].get(k) for k in keys}
        )
        history.extend(place | evaluation_row(evaluation) for evaluation in record["history"])
        pruned.extend(place | {"run_id": record["run_id"]} | row for row in prune_rows(prunes.get(name, [])))
    layout.tables.mkdir(parents=True, exist_ok=True)
    clear_stale(layout.tables)
    scores = dict.fromkeys(key for row in trials for key in row if key.startswith(QA))
    schema = (
        TRIALS_SCHEMA
        | dict.fromkeys(scores, pl.Float64())
        | {FACTOR + key: _dtype(row[FACTOR + key] for row in trials) for key in keys}
    )
    frame = _frame(trials, schema)
    _write(frame, layout.tables / files.TRIALS)
    for table, columns_of in _STREAMED.items():
        _stream(layout, order, table, columns_of)
    _write_or_remove(window_table(layout, frame), layout.tables / files.WINDOWS)
    evaluations = pl.DataFrame(history, {k: t for k, t in HISTORY_SCHEMA.items() if k not in _ROUTING}, strict=False)
    routing = routing_rows(layout.tables / files.TREES)
    evaluations = evaluations.join(routing, on=["trial", "step"], how="left", maintain_order="left")
    _write(evaluations.select(list(HISTORY_SCHEMA)), layout.tables / files.HISTORY)
    _write_or_remove(pl.DataFrame(pruned, PRUNE_SCHEMA, strict=False), layout.tables / files.PRUNE)
    _write_or_remove(rate_table(frame, plan), layout.tables / files.RATES)
    return layout.tables


def _prune_report(path: Path) -> dict[str, Any]:
    try:
        data = from_json(path.read_bytes())
    except ValueError:
        data = None
    if not isinstance(data, dict) or not data.keys() >= REQUIRED_PRUNE:
        raise ConfigError(f"result {str(path)!r} is damaged: delete it and run `ablate prune` again")
    return data


def trial_row(record: dict[str, Any]) -> dict[str, Any]:
    """A record's columns of TRIALS_SCHEMA, apart from its place in the study."""
    history = record["history"]
    first, last = history[0], history[-1]
    leaves, cost, origin = record["leaves"], record["cost"], record["provenance"]
    n_eff = [e["balance"]["n_eff_frac"] for e in history if "n_eff_frac" in e["balance"]]
    dead = [e["balance"]["dead_frac"] for e in history if "dead_frac" in e["balance"]]
    row = {
        "status": record["status"],
        "run_id": record["run_id"],
        "config": json.dumps(record["config"], sort_keys=True, separators=(",", ":")),
        "lr": record["config"]["train"]["lr"],
        "bpb": last["bpb"],
        "bpb_start": first["bpb"],
        **{name: last.get("task", {}).get(name) for name in TASK},
        **{start: first.get("task", {}).get(name) for name, start in STARTS.items()},
        "train_loss": last["train_loss"],
        "n_eff_frac_start": first["balance"].get("n_eff_frac"),
        "n_eff_frac_min": min(n_eff, default=None),
        "dead_frac_start": first["balance"].get("dead_frac"),
        "dead_frac_max": max(dead, default=None),
        "leaves_dead_start": _whole(leaves.get("dead_start")),
        "leaves_dead_end": _whole(leaves.get("dead_end")),
        "born_dead_frac": leaves.get("born_dead"),
        "never_alive_frac": leaves.get("never_alive"),
        "pruned_frac": leaves.get("pruned"),
        "revived_frac": leaves.get("transient"),
        "tokens": last["tokens"],
        "seconds": record["seconds"],
        "tokens_per_second": record["tokens_per_second"],
        "versions": json.dumps(origin["versions"], sort_keys=True),
        "message": record["message"],
    }
    row |= {name: last["balance"].get(name) for name in BALANCE}
    row |= {column: record.get("trees", {}).get(name) for name, column in TREE_MEANS.items()}
    row |= {name: cost[name] for name in COST}
    row |= columns(Score.model_validate(score) for score in record.get("scores", []))
    names = ("git_commit", "git_dirty", "data_hash", "tokenizer_hash", "machine", "threads", "device", "route_table")
    return row | {name: origin[name] for name in names}


def evaluation_row(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's columns of HISTORY_SCHEMA."""
    row = {name: evaluation[name] for name in ("step", "tokens", "bpb", "train_loss", "lr")}
    row |= {name: evaluation.get("task", {}).get(name) for name in TASK}
    return row | {"train_seconds": evaluation["seconds"]} | {name: evaluation["balance"].get(name) for name in BALANCE}


def routing_rows(trees: Path) -> pl.DataFrame:
    """Mean and worst tree of the ROUTING columns of trees.parquet, one row a trial and evaluation."""
    rows = pl.scan_parquet(trees, glob=False).group_by("trial", pl.col("step").cast(pl.Int64))
    means = [pl.col(name).cast(pl.Float64).mean() for name in ROUTING]
    worst = [getattr(pl.col(name).cast(pl.Float64), end)().alias(f"{name}_worst") for name, end in ROUTING.items()]
    return rows.agg(*means, *worst).collect(engine="streaming")


def prune_rows(files: Iterable[Path]) -> list[dict[str, Any]]:
    """What pruning one trial showed, as rows of PRUNE_SCHEMA apart from its place; thresholds ascending."""
    rows = []
    reports = [_prune_report(path) for path in files]
    for report in sorted(reports, key=lambda r: float(r["threshold"])):
        before, controls = report["bpb_before"], report["controls"]
        results = {
            DEAD: (report["units_after"], report["bpb_after"]),
            RANDOM: (controls["random"]["units"], statistics.fmean(controls["random"]["bpb"])),
            MAGNITUDE: (controls["smallest_norm"]["units"], statistics.fmean(controls["smallest_norm"]["bpb"])),
        }
        rows += [
            {
                "method": method,
                "threshold": report["threshold"],
                "removed_frac": 1 - units / report["units_before"],
                "bpb_before": before,
                "bpb_after": bpb,
                "delta_bpb": bpb - before,
            }
            for method, (units, bpb) in results.items()
        ]
    return rows


def _order(layout: Layout, plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Trials that are done and belong to the plan, in its order: hash to arm, kind, seed and factors."""
    done = layout.done()
    if plan["design"] != "search":
        return {t["trial"]: t for t in plan["trials"] if t["trial"] in done}
    order = {}
    for name in sorted(done):
        record = read_record(layout.record(name))
        if record["space"] == plan["space"]:
            order[name] = {key: record[key] for key in ("arm", "kind", "seed", "factors")}
    return order


def _tuned(plan: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    found = plan["tuned"].get(known["arm"]) if known["kind"] != "tune" else None
    return {"lr_at_edge": found["at_edge"] if found else None}


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _dtype(values: Iterable[Any]) -> pl.DataType:
    """The type that a factor's values share; text where they share none."""
    kinds = {type(v) for v in values if v is not None}
    if kinds == {bool}:
        return pl.Boolean()
    if kinds == {int}:
        return pl.Int64()
    return pl.Float64() if kinds and kinds <= {int, float} else pl.String()


def _frame(rows: list[dict[str, Any]], schema: dict[str, pl.DataType]) -> pl.DataFrame:
    columns = {}
    for name, dtype in schema.items():
        values = [row.get(name) if name.startswith(QA) else row[name] for row in rows]
        if name.startswith(FACTOR) and dtype == pl.String():
            values = [None if v is None else str(v) for v in values]
        columns[name] = pl.Series(name, values, dtype=dtype, strict=False)
    return pl.DataFrame(columns)


def _write(frame: pl.DataFrame, path: Path) -> None:
    with replacing(path) as partial:
        frame.write_parquet(partial, compression="zstd")


def _write_or_remove(frame: pl.DataFrame, path: Path) -> None:
    """Write a table that only some studies have; an earlier one goes where there are no rows."""
    if frame.is_empty():
        path.unlink(missing_ok=True)
    else:
        _write(frame, path)


def _stream(layout: Layout, order: dict[str, dict[str, Any]], table: str, schema: dict[str, pl.DataType]) -> None:
    """Stream a table of every trial into one; memory stays bounded however many trials there are."""
    path, there = layout.tables / table, layout.names()
    present = [name for name in order if f"{name}.{table}" in there]
    sources = [f"{layout.results}/{name}.{table}" for name in present]
    if not present:
        _write(pl.DataFrame(schema=schema), path)
        return
    place = pl.LazyFrame(
        {
            "file": sources,
            "study": [layout.study] * len(present),
            "trial": present,
            "arm": [order[name]["arm"] for name in present],
            "seed": [order[name]["seed"] for name in present],
        },
        schema_overrides={"seed": pl.Int64()},
    )
    rows = pl.scan_parquet(sources, glob=False, include_file_paths="file")
    joined = rows.join(place, on="file", how="left", maintain_order="left").select(list(schema))
    with replacing(path) as partial:
        joined.sink_parquet(partial, compression="zstd", maintain_order=True, row_group_size=ROW_GROUP)
