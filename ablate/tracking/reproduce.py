"""`ablate reproduce RUN_ID`: run a tracked or a published trial again from its logged configuration, and compare."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ablate.config import ConfigError, Trial, parse
from ablate.config.endpoints import BPB
from ablate.results.layout import HISTORY, TRIALS
from ablate.tracking import tags as names
from ablate.tracking.store import default_uri, prepare_store
from ablate.training.result import TrialResult

PUBLISHED = f"reports/*/data/{TRIALS}"
"""Tables that `ablate publish` keeps: a clone has them, and no MLflow database."""
SHORTEST = 8
"""Characters that name a published run: what the reports print of it."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """The same trial, twice."""

    trial: str
    """Hash of the configuration."""
    before: dict[int, float]
    """Step to bpb, as logged."""
    after: dict[int, float]
    """Step to bpb, now."""
    changed: dict[str, tuple[str, str]]
    """What bit equality depends on and is not as it was: tag to (then, now)."""

    @property
    def equal(self) -> bool:
        """Whether every evaluation's bpb is the same bit for bit."""
        return self.before == self.after

    @property
    def largest_difference(self) -> float:
        """Largest absolute difference of bpb over the steps that both have; infinite where a step is missing."""
        if self.before.keys() != self.after.keys():
            return float("inf")
        return max((abs(self.after[step] - bpb) for step, bpb in self.before.items()), default=0.0)


def reproduce(run_id: str, root: Path, *, data_root: Path | None = None, tracking: str | None = None) -> Reproduction:
    """Run a trial again, with the threads it had; nothing is kept.

    Args:
        run_id: an MLflow run's id, or the id (its first 8 characters will do) of a run in a published report.
        root: the project; its reports/*/data are searched first, so that a clone needs no MLflow.

    Raises:
        ConfigError: there is no such run, it is not a trial's, or its settings are not valid any more.
    """
    from ablate.training.trial import run_trial

    found = _published(run_id, root)
    if found is None:
        uri = tracking or default_uri(root.resolve())
        found = _logged(prepare_store(uri), run_id, uri)
    trial, tags, before = found
    threads = tags.get(names.THREADS)
    with tempfile.TemporaryDirectory(prefix="ablate-reproduce-") as folder:
        result = run_trial(
            trial,
            data_root=data_root or root / "data",
            folder=Path(folder),
            threads=int(threads) if threads else None,
            resume=False,
        )
    after = {e.step: e.bpb for e in result.history if e.bpb is not None}
    return Reproduction(trial.hash(), before, after, _changed(tags, result))


def _published(run_id: str, root: Path) -> tuple[Trial, dict[str, str], dict[int, float]] | None:
    """A published run's settings, tags and bpb by step; None where no published table has it."""
    if len(run_id) < SHORTEST:
        return None
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(root.glob(PUBLISHED)):
        rows = pl.scan_parquet(path).filter(pl.col("run_id").str.starts_with(run_id)).collect()
        found |= {row["run_id"]: (path, row) for row in rows.iter_rows(named=True)}
    if len(found) > 1:
        raise ConfigError(f"run {run_id!r} could be any of {', '.join(sorted(found))}: give more of its id")
    if not found:
        return None
    path, row = next(iter(found.values()))
    kept = (names.GIT_COMMIT, names.DATA_HASH, names.TOKENIZER_HASH, names.MACHINE, names.DEVICE, names.VERSIONS)
    origin = {name: row[name.removeprefix("ablate.")] for name in kept}
    origin |= {names.GIT_DIRTY: str(row["git_dirty"]).lower(), names.THREADS: row["threads"]}
    origin = {name: str(value) for name, value in origin.items() if value is not None}
    history = pl.scan_parquet(path.with_name(HISTORY))
    evaluations = history.filter(pl.col("trial") == row["trial"], pl.col(BPB.name).is_not_null()).collect()
    trial = parse(Trial, json.loads(row["config"]), where=f"run {row['run_id']}")
    return trial, origin, dict(zip(evaluations["step"].to_list(), evaluations[BPB.name].to_list(), strict=True))


def _logged(client: MlflowClient, run_id: str, uri: str) -> tuple[Trial, dict[str, str], dict[int, float]]:
    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise ConfigError(
            f"run {run_id!r} is unknown at {uri} and in reports/*/data: give the id of a trial's run"
        ) from None
    tags = dict(run.data.tags)
    if tags.get(names.ROLE) != "trial":
        raise ConfigError(f"run {run_id!r} is a {tags.get(names.ROLE, 'foreign')} run: give the id of a trial's run")
    trial = parse(Trial, _nested(run.data.params), where=f"run {run_id}")
    history = client.get_metric_history(run_id, BPB.name)
    return trial, tags, {metric.step: metric.value for metric in history}


def _nested(params: dict[str, str]) -> dict[str, Any]:
    """Dotted parameters as nested settings; texts are read as they are, everything else as JSON."""
    data: dict[str, Any] = {}
    for key, text in params.items():
        *sections, field = key.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        try:
            place[field] = json.loads(text)
        except json.JSONDecodeError:
            place[field] = text
    return data


def _changed(tags: dict[str, str], result: TrialResult) -> dict[str, tuple[str, str]]:
    origin = result.provenance
    now = {
        names.GIT_COMMIT: origin.git_commit,
        names.GIT_DIRTY: str(origin.git_dirty).lower(),
        names.DATA_HASH: origin.data_hash,
        names.TOKENIZER_HASH: origin.tokenizer_hash,
        names.MACHINE: origin.machine,
        names.DEVICE: origin.device,
        names.THREADS: str(origin.threads),
    }
    changed = {key: (tags.get(key, ""), value) for key, value in now.items() if tags.get(key, "") != value}
    then = json.loads(tags.get(names.VERSIONS, "{}"))
    for name in sorted(then.keys() | origin.versions.keys() if then else ()):
        if then.get(name) != origin.versions.get(name):
            changed[f"{names.VERSIONS}.{name}"] = (then.get(name, "none"), origin.versions.get(name, "none"))
    return changed
