"""The tables of one study, read and checked: everything downstream works on these frames and nothing else."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from ablate.config import ConfigError, Study, load_study, reason
from ablate.results.columns import (
    FACTOR,
    HISTORY_SCHEMA,
    LATER,
    MOTION_TABLE_SCHEMA,
    PRUNE_SCHEMA,
    QA,
    TRIALS_SCHEMA,
    USAGE_TABLE_SCHEMA,
    WINDOWS_TABLE_SCHEMA,
)
from ablate.results.layout import WINDOWS
from ablate.results.seal import Broken, unsealed

Schema = Mapping[str, pl.DataType]
WHOLE = {"seed"}
"""Whole numbers that are names, not measurements."""
STATUSES = {"finished", "diverged", "pruned", "killed"}
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Tables:
    """One study: its settings, its plan and its tables.

    `trials` (sorted by kind, arm and seed) has one row a trial with the columns of results.columns.TRIALS_SCHEMA, and
    `history` one row an evaluation with those of HISTORY_SCHEMA; measured numbers are floats, NaN and infinity are null.
    `usage` is a lazy scan, None where there is no such table: a large study's usage does not fit in memory.
    """

    name: str
    study: Study
    plan: dict[str, Any]
    trials: pl.DataFrame
    history: pl.DataFrame
    usage: pl.LazyFrame | None
    prune: pl.DataFrame | None
    digests: dict[str, str]
    motion: pl.LazyFrame | None = None
    """Each node's motion, for studies whose trials record it (train.motion)."""
    windows: pl.DataFrame | None = None
    """Means of each arm's windows at the last evaluation; None where the trials have none."""

    @cached_property
    def factors(self) -> list[str]:
        """Dotted names of the study's factors that take more than one level, in the file's order.

        Fields that only named arms change are factors where the study has no others (a `confirm`).
        """
        named = [key for arm in self.study.arms.values() for key in arm]
        known = list(self.study.factors) or list(dict.fromkeys(named))
        return [f for f in known if FACTOR + f in self.trials.columns and self._varies(f)]

    def _varies(self, factor: str) -> bool:
        planned = self.trials.filter(pl.col("kind").is_in(["arm", "search"]))
        return planned[FACTOR + factor].drop_nulls().n_unique() > 1

    def grid(self) -> pl.DataFrame:
        """Trials of the arms that the factors span: named arms and controls left out."""
        return self.trials.filter((pl.col("kind") == "arm") & ~pl.col("arm").is_in([*self.study.arms]))

    def evaluation(self, *, finalists: bool = False) -> pl.DataFrame:
        """Trials that answer the question: arms and controls, or a search's racing runs; tuning is left out."""
        return self.trials.filter(pl.col("kind").is_in(["arm", "control", "search", *["finalist"] * finalists]))


def load(name: str, root: Path) -> Tables:
    """Read and check the tables of a study.

    Raises:
        ConfigError: the name is none, the study file or a table is missing (the message says which command makes it),
            a column is missing or unknown, or there is no trial.
    """
    if not STUDY_NAME.fullmatch(name):
        raise ConfigError(f"study name {name!r}: letters, digits, '.', '_' and '-' are allowed, 64 at most")
    study = load_study(root / "studies" / f"{name}.yaml")
    folder = root / "tables" / name
    trials = _trials(folder / "trials.parquet", name)
    history = _history(folder / "history.parquet", name)
    plan_path = root / "results" / name / "plan.json"
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in (
            folder / "trials.parquet",
            folder / "history.parquet",
            folder / WINDOWS,
            plan_path,
            root / "studies" / f"{name}.yaml",
        )
        if path.exists()
    }
    prune_path = folder / "prune.parquet"
    prune = _read(prune_path, name, PRUNE_SCHEMA) if prune_path.exists() else None
    if prune is not None:
        prune = prune.with_columns(run_id=pl.col("run_id").fill_null(pl.col("trial")))
    usage = _scan(folder / "usage.parquet", name, USAGE_TABLE_SCHEMA)
    motion = _scan(folder / "motion.parquet", name, MOTION_TABLE_SCHEMA)
    windows_path = folder / WINDOWS
    windows = _read(windows_path, name, WINDOWS_TABLE_SCHEMA) if windows_path.exists() else None
    return Tables(name, study, _plan(plan_path), trials, history, usage, prune, digests, motion, windows)


def _read(path: Path, name: str, schema: Schema) -> pl.DataFrame:
    if not path.exists():
        raise ConfigError(
            f"table {str(path)!r} does not exist: run `ablate study run studies/{name}.yaml`, "
            f"then `ablate collect {name}`"
        )
    try:
        frame = pl.read_parquet(path, glob=False)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"table {str(path)!r} cannot be read ({reason}): run `ablate collect {name}`") from None
    _check(frame.columns, schema, path, name)
    later = [pl.lit(None, dtype).alias(c) for c, dtype in schema.items() if c not in frame.columns]
    # Measured numbers are read as floats, so that means and JSON are the same whatever a column was stored as.
    counts = [pl.col(c).cast(pl.Float64) for c, dtype in schema.items() if dtype.is_integer() and c not in WHOLE]
    frame = frame.with_columns(later).with_columns(counts)
    floats = [c for c, dtype in frame.schema.items() if dtype.is_float()]
    return frame.with_columns(pl.when(pl.col(c).is_finite()).then(pl.col(c)).alias(c) for c in floats)


def _check(columns: Iterable[str], schema: Schema, path: Path, name: str) -> None:
    """Refuse a table with a column too few or too many; columns of LATER may be missing."""
    have = set(columns)
    missing = [c for c in schema if c not in have and c not in LATER]
    if missing:
        raise ConfigError(f"table {str(path)!r} has no column {missing[0]!r}: run `ablate collect {name}` again")
    unknown = sorted(c for c in have if c not in schema and not c.startswith((FACTOR, QA)))
    if unknown:
        raise ConfigError(
            f"table {str(path)!r} has the column {unknown[0]!r}, which this version does not know: "
            f"run `ablate collect {name}` again"
        )


def _trials(path: Path, name: str) -> pl.DataFrame:
    frame = _read(path, name, TRIALS_SCHEMA)
    if frame.is_empty():
        raise ConfigError(f"table {str(path)!r} has no trial: run `ablate study run studies/{name}.yaml` first")
    unknown = set(frame["status"].drop_nulls().unique()) - STATUSES
    if unknown:
        raise ConfigError(f"table {str(path)!r}: status is {min(unknown)!r}; allowed are {', '.join(sorted(STATUSES))}")
    if frame["trial"].is_duplicated().any():
        twice = frame.filter(pl.col("trial").is_duplicated())["trial"][0]
        raise ConfigError(f"table {str(path)!r}: trial {twice!r} is listed twice; run `ablate collect {name}` again")
    return frame.with_columns(run_id=pl.col("run_id").fill_null(pl.col("trial"))).sort("kind", "arm", "seed", "trial")


def _history(path: Path, name: str) -> pl.DataFrame:
    return _read(path, name, HISTORY_SCHEMA).sort("arm", "seed", "trial", "step")


def _scan(path: Path, name: str, schema: Schema) -> pl.LazyFrame | None:
    if not path.exists():
        return None
    try:
        scan = pl.scan_parquet(path, glob=False)
        columns = scan.collect_schema().names()
        if "trial" in columns:
            # Reads the column and keeps none of it.
            scan.select(pl.col("trial").str.len_bytes().sum()).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(
            f"table {str(path)!r} cannot be read ({reason(error)}): run `ablate collect {name}`"
        ) from None
    _check(columns, schema, path, name)
    return scan


def _plan(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        plan = json.loads(unsealed(path.read_bytes())[0])
    except Broken:
        raise ConfigError(f"plan {str(path)!r} is damaged: it is not what `ablate study run` wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ConfigError(f"plan {str(path)!r} is not JSON: it was damaged after `ablate study run` wrote it") from None
    return plan if isinstance(plan, dict) else {}


def canonical(data: Any) -> str:
    """JSON text that is the same for the same data: floats at ten significant digits, NaN and infinities as null."""
    return json.dumps(_rounded(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _rounded(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(k): _rounded(v) for k, v in data.items()}
    if isinstance(data, list) and data and isinstance(data[0], str) and isinstance(data[-1], str):
        return data  # run ids, by the ten thousand
    if isinstance(data, (list, tuple)):
        return [_rounded(v) for v in data]
    if hasattr(data, "item") and not isinstance(data, (str, bytes)):
        data = data.item()
    if isinstance(data, float):
        return float(f"{data:.10g}") if math.isfinite(data) else None
    return data
