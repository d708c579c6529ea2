"""Finding the weights of a run by the names people have for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ablate.config import ConfigError, Trial
from ablate.results.layout import MODEL, USAGE

_HASH = re.compile(r"[0-9a-f]{12}")
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def find_checkpoint(run: str, root: Path) -> Path:
    """The weights file of `run`: a trial's hash, an MLflow run's id, a weights file, or a folder with a `model.pt`.

    Trials are looked up in root/results/<study>/<trial>.json, their weights lie in root/state/trials/<trial>/. Raises
    ConfigError for a run that is not known, and for one whose weights were not kept.
    """
    path = Path(run).expanduser()
    if path.is_dir():
        if not (path / MODEL).is_file():
            raise ConfigError(f"run {run!r} is a folder without a {MODEL}")
        return path / MODEL
    if path.is_file():
        return path
    records = _records(run, root)
    weights = _weights(records[0].stem if records else run, root)
    if weights.is_file():
        return weights
    if not records:
        raise ConfigError(f"run {run!r} is not known: no result in {str(root / 'results')!r} has it")
    record, study = json.loads(records[0].read_text(encoding="utf-8")), records[0].parent.name
    if record["status"] != "finished":
        raise ConfigError(f"run {run!r} of study {study!r} ended {record['status']}: only finished ones keep weights")
    raise ConfigError(
        f"run {run!r} of study {study!r} kept no weights: set train.keep_checkpoint to true under base and run it again"
    )


def is_own(weights: Path, trial: Trial, root: Path) -> bool:
    """Whether a weights file is what the trial itself left, not a pruned or copied one."""
    return weights.resolve() == _weights(trial.hash(), root).resolve()


def _weights(trial: str, root: Path) -> Path:
    return root / "state" / "trials" / trial / MODEL


def find_usage(run: str, root: Path) -> Path:
    """The usage table of a trial by its hash or its MLflow run's id, or a .parquet file itself; else ConfigError."""
    path = Path(run).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise ConfigError(f"run {run!r} is no usage table: a .parquet file is expected")
        return path
    for record in _records(run, root):
        return record.with_name(f"{record.stem}.{USAGE}")
    raise ConfigError(f"run {run!r} is not known: no result in {str(root / 'results')!r} has it")


def _records(run: str, root: Path) -> list[Path]:
    """The result files that a trial's hash or a run's id names."""
    if _HASH.fullmatch(run):
        return sorted((root / "results").glob(f"*/{run}.json"))
    if _RUN_ID.fullmatch(run):
        return [p for p in sorted((root / "results").glob("*/*.json")) if _run_id(p) == run]
    raise ConfigError(
        f"run {run!r} is not known: a file that exists, a trial's hash (12 hex digits) or an MLflow run's id (32) is expected"
    )


def _run_id(record: Path) -> str | None:
    """The MLflow run that a trial's record names; None for files that are not records."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    run_id = content.get("run_id") if isinstance(content, dict) else None
    return run_id if isinstance(run_id, str) else None
