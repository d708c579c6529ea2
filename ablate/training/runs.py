"""Find the result and the weights of a run by the names people have for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from ablate.config import ConfigError, Trial
from ablate.results.layout import MODEL, PRUNE_MARK, USAGE

SHORTEST = 8
"""Characters that name a trial or a run: what the reports print of a run's id."""
RUN_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(rf"[0-9a-f]{{{SHORTEST},32}}")


def find_checkpoint(run: str, root: Path) -> Path:
    """The weights file of `run`: a trial's hash or an MLflow run's id
    (8 characters do), a weights file, or a folder with a `model.pt`.

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
    records = _known(run, root)
    weights = weights_of(records[0].stem if records else run, root)
    if weights.is_file():
        return weights
    if not records:
        raise ConfigError(f"run {run!r} is not known: no result in {str(root / 'results')!r} has it")
    study, status = records[0].parent.name, _content(records[0]).get("status")
    if not isinstance(status, str):
        raise ConfigError(f"result {str(records[0])!r} is damaged: `ablate doctor --fix` sets it aside")
    if status != "finished":
        raise ConfigError(f"run {run!r} of study {study!r} ended {status}: only finished ones keep weights")
    raise ConfigError(
        f"run {run!r} of study {study!r} kept no weights: `ablate reproduce {run} --keep` trains it again and keeps them "
        "(train.keep_checkpoint: true under base keeps those of every trial)"
    )


def is_own(weights: Path, trial: Trial, root: Path) -> bool:
    """Whether a weights file is what the trial itself left, not a pruned or copied one."""
    return weights.resolve() == weights_of(trial.hash(), root).resolve()


def weights_of(trial: str, root: Path) -> Path:
    """Return where a trial's weights lie, if it keeps them."""
    return root / "state" / "trials" / trial / MODEL


def find_usage(run: str, root: Path) -> Path:
    """The usage table of a trial by its hash or its MLflow run's id, or a .parquet file itself; else ConfigError."""
    path = Path(run).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise ConfigError(f"run {run!r} is no usage table: a .parquet file is expected")
        return path
    for record in _known(run, root):
        usage = record.with_name(f"{record.stem}.{USAGE}")
        if not usage.exists():
            raise ConfigError(f"run {run!r} has no usage table: {str(usage)!r} does not exist; see `ablate doctor`")
        return usage
    raise ConfigError(f"run {run!r} is not known: no result in {str(root / 'results')!r} has it")


def find_records(run: str, root: Path) -> list[Path]:
    """Return the result files of the trial that a hash or a run's id names (8 characters do), one a study; [] for none.

    Raises:
        ConfigError: the name fits several trials.
    """
    if not _NAME.fullmatch(run):
        return []
    results = root / "results"
    found = [p for p in sorted(results.glob(f"*/{run}*.json")) if PRUNE_MARK not in p.name]
    found = found or [p for p in sorted(results.glob("*/*.json")) if (_run_id(p) or "").startswith(run)]
    trials = sorted({path.stem for path in found})
    if len(trials) > 1:
        raise ConfigError(f"run {run!r} could be any of {', '.join(trials[:5])}: give more of its name")
    return found


def _known(run: str, root: Path) -> list[Path]:
    """Return the result files that a name leads to; raises ConfigError for what is no such name."""
    if not _NAME.fullmatch(run):
        raise ConfigError(
            f"run {run!r} is not known: a file that exists, a trial's hash (12 hex digits) or an MLflow run's id (32) is "
            f"expected, {SHORTEST} characters or more"
        )
    return find_records(run, root)


def _run_id(record: Path) -> str | None:
    """The MLflow run that a trial's record names; None for files that are not records."""
    run_id = _content(record).get("run_id")
    return run_id if isinstance(run_id, str) else None


def _content(record: Path) -> dict[str, Any]:
    """Return what a result file says, {} where it is damaged."""
    try:
        content = from_json(record.read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
