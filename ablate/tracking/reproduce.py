"""`ablate reproduce TRIAL`: run a finished, a published or a tracked trial again from its settings, and compare."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ablate.config import ConfigError, Trial, parse
from ablate.config.endpoints import quality_of
from ablate.results.kept import KEPT, table
from ablate.results.layout import HISTORY, MODEL, TRIALS
from ablate.results.record import load_record
from ablate.tracking import tags as names
from ablate.training.result import Evaluation, Observer, Provenance
from ablate.training.runs import RUN_ID, SHORTEST, find_records, weights_of

PUBLISHED = f"reports/*/{KEPT}"
"""What `ablate publish` keeps: a clone has them, and no MLflow database."""
Found = tuple[Trial, dict[str, str], dict[int, float]]
"""A trial's settings, its tags, and its task's quality by step."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """The same trial, twice."""

    trial: str
    """Hash of the configuration."""
    endpoint: str
    """Name of the task's quality."""
    before: dict[int, float]
    """Step to the task's quality, as logged."""
    after: dict[int, float]
    """Step to the task's quality, now."""
    changed: dict[str, tuple[str, str]]
    """What bit equality depends on and is not as it was: tag to (then, now)."""
    weights: Path | None = None
    """Where the weights were kept, if they were."""

    @property
    def equal(self) -> bool:
        """Whether every evaluation's quality is the same bit for bit."""
        return self.before == self.after

    @property
    def largest_difference(self) -> float:
        """Largest absolute difference of quality over the steps that both have; infinite where a step is missing."""
        if self.before.keys() != self.after.keys():
            return float("inf")
        return max((abs(self.after[step] - value) for step, value in self.before.items()), default=0.0)

    @property
    def verdict(self) -> str:
        """Whether the two are equal, in words; where they are not and the code is another, which commit they need."""
        if self.equal:
            return "Equal bit for bit."
        words = f"Not equal: {self.endpoint} differs by up to {self.largest_difference:g}."
        made, _ = self.changed.get(names.GIT_COMMIT, ("", ""))
        return f"{words} Commit {made} made it: check that out to repeat it exactly." if made else words


def reproduce(
    run: str,
    root: Path,
    *,
    data_root: Path | None = None,
    tracking: str | None = None,
    keep: bool = False,
    observer: Observer | None = None,
) -> Reproduction:
    """Run a trial again, with the threads it had.

    Args:
        run: a trial's hash or an MLflow run's id; the first 8 characters do for trials of root/results and reports.
        root: the project; results/ is searched first, then what is published, then MLflow.
        data_root: prepared corpora; root/data where not given.
        tracking: MLflow's address; the project's own database where not given.
        keep: put the weights where `train.keep_checkpoint` would have put them, if the two are equal.
        observer: watches the training.

    Raises:
        ConfigError: there is no such trial, its name fits several, its settings are not valid any more, or its weights cannot be kept.
    """
    trial, tags, before = _find(run, root, tracking)
    if keep and trial.task.kind != "language":
        raise ConfigError(f"run {run!r} is of task {trial.task.kind!r}: only weights of language models are kept")

    from ablate.training.trial import run_trial  # it imports torch

    threads = tags.get(names.THREADS)
    train = trial.train.model_copy(update={"keep_checkpoint": trial.train.keep_checkpoint or keep})
    with tempfile.TemporaryDirectory(prefix="ablate-reproduce-") as folder:
        result = run_trial(
            trial.model_copy(update={"train": train}),
            data_root=data_root or root / "data",
            folder=Path(folder),
            observer=observer,
            threads=int(threads) if threads else None,
            resume=False,
        )
        after = _values(trial, result.history)
        weights = weights_of(trial.hash(), root)
        kept = keep and before == after and result.status == "finished"
        if kept:
            _keep(Path(folder) / MODEL, weights, trial)
    changed = _changed(tags, result.provenance)
    quality = quality_of(trial.task.kind).name
    return Reproduction(trial.hash(), quality, before, after, changed, weights if kept else None)


def _keep(made: Path, weights: Path, trial: Trial) -> None:
    """Copy weights to the place of the trial that they are of."""
    from ablate.training.checkpoint import load_model, save_model

    model, _, tokenizer = load_model(made)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_model(weights, model, trial, tokenizer)


def _find(run: str, root: Path, tracking: str | None) -> Found:
    """Return what is known of a trial; MLflow, which takes seconds to import, is asked last."""
    found = _own(run, root) or _published(run, root)
    if found is None and RUN_ID.fullmatch(run):
        from ablate.tracking.logged import logged

        found = logged(run, root, tracking)
    if found is None:
        raise ConfigError(
            f"run {run!r} is unknown: no result in 'results' and no published one in 'reports' has it; a trial's hash or "
            f"an MLflow run's id is expected, {SHORTEST} characters or more"
        )
    return found


def _own(run: str, root: Path) -> Found | None:
    """Return a finished trial of this project; None where no result has that name."""
    records = find_records(run, root)
    if not records:
        return None
    record = load_record(records[0])
    return record.config, _origin(record.provenance), _values(record.config, record.history)


def _values(trial: Trial, history: list[Evaluation]) -> dict[int, float]:
    """Return the quality of a trial's task by step."""
    quality = quality_of(trial.task.kind)
    return {e.step: value for e in history if (value := quality.value(e)) is not None}


def _published(run_id: str, root: Path) -> Found | None:
    """Return a trial of a published study; None where no published table has it."""
    if len(run_id) < SHORTEST:
        return None
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(root.glob(PUBLISHED)):
        rows = pl.scan_parquet(table(path, TRIALS)).filter(
            pl.col("run_id").str.starts_with(run_id) | pl.col("trial").str.starts_with(run_id)
        )
        found |= {row["trial"]: (path, row) for row in rows.collect().iter_rows(named=True)}
    if len(found) > 1:
        raise ConfigError(f"run {run_id!r} could be any of {', '.join(sorted(found))}: give more of its id")
    if not found:
        return None
    path, row = next(iter(found.values()))
    kept = (names.GIT_COMMIT, names.DATA_HASH, names.TOKENIZER_HASH, names.MACHINE, names.DEVICE, names.VERSIONS)
    origin = {name: row[name.removeprefix("ablate.")] for name in kept}
    origin |= {names.GIT_DIRTY: str(row["git_dirty"]).lower(), names.THREADS: row["threads"]}
    origin = {name: str(value) for name, value in origin.items() if value is not None}
    history = pl.scan_parquet(table(path, HISTORY))
    trial = parse(Trial, json.loads(row["config"]), where=f"trial {row['trial']}")
    name = quality_of(trial.task.kind).name
    evaluations = history.filter(pl.col("trial") == row["trial"], pl.col(name).is_not_null()).collect()
    return trial, origin, dict(zip(evaluations["step"].to_list(), evaluations[name].to_list(), strict=True))


def _origin(made: Provenance) -> dict[str, str]:
    """Return what bit equality depends on, as tags."""
    return {
        names.GIT_COMMIT: made.git_commit,
        names.GIT_DIRTY: str(made.git_dirty).lower(),
        names.DATA_HASH: made.data_hash,
        names.TOKENIZER_HASH: made.tokenizer_hash,
        names.MACHINE: made.machine,
        names.DEVICE: made.device,
        names.THREADS: str(made.threads),
        names.VERSIONS: json.dumps(made.versions, sort_keys=True),
    }


def _changed(tags: dict[str, str], made: Provenance) -> dict[str, tuple[str, str]]:
    now = _origin(made)
    del now[names.VERSIONS]
    changed = {key: (tags.get(key, ""), value) for key, value in now.items() if tags.get(key, "") != value}
    then = json.loads(tags.get(names.VERSIONS, "{}"))
    for name in sorted(then.keys() | made.versions.keys() if then else ()):
        if then.get(name) != made.versions.get(name):
            changed[f"{names.VERSIONS}.{name}"] = (then.get(name, "none"), made.versions.get(name, "none"))
    return changed
