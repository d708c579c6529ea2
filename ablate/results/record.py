"""A trial's result on disk: one immutable JSON file with tables beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
from pydantic import Field, ValidationError
from pydantic_core import from_json

from ablate.balance import metrics, usage
from ablate.config import ConfigError, Scalar
from ablate.files import replacing, write_text
from ablate.results.layout import MODEL, Layout
from ablate.results.seal import Broken, digest_of, sealed, unsealed
from ablate.training.result import TrialResult

if TYPE_CHECKING:  # it needs torch, which those who only read results do without
    from ablate.balance.prune import PruneReport

Kind = Literal["arm", "control", "tune", "search", "finalist"]


class Record(TrialResult):
    """A trial's result with its place in the study."""

    study: str
    space: str
    """Hash of the space that the study had then."""
    trial: str
    arm: str
    kind: Kind
    seed: int
    factors: dict[str, Scalar]
    run_id: str | None
    """MLflow's run; None where the server was away when the trial ended (the run carries the trial's hash as a tag)."""
    leaves: dict[str, float]
    """Births and deaths of leaves over the held-out evaluations: balance.metrics.Deaths.shares, mean over trees, and
    counts of dead leaves at the first and the last evaluation; empty without a tree."""
    trees: dict[str, float] = Field(default_factory=dict)
    """Last evaluation's columns of balance.usage.TREES_SCHEMA, mean over layers and trees; empty without a tree."""
    digests: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each table beside the record and of kept weights, by name; empty in records of earlier versions."""


_REQUIRED = {name for name, field in Record.model_fields.items() if field.is_required()}


def save_record(layout: Layout, record: Record, folder: Path) -> None:
    """Make a trial done: the tables in its folder first, then its record with their digests, each in one step."""
    digests = dict(record.digests)
    for made, kept in layout.side_tables(record.trial).items():
        if (folder / made).exists():
            with replacing(kept) as partial:
                shutil.copyfile(folder / made, partial)
                digests[made] = digest_of(partial)
    if (folder / MODEL).exists():
        digests[MODEL] = digest_of(folder / MODEL)
    record = record.model_copy(update={"digests": digests})
    write_text(layout.record(record.trial), sealed(record.model_dump_json(indent=1)))


def save_prune(root: Path, trial: str, report: PruneReport) -> list[Path]:
    """Put what pruning a trial showed beside its result in every study that has it; a threshold's earlier one goes."""
    studies = [p.parent.name for p in sorted((root / "results").glob(f"*/{trial}.json"))]
    kept = [Layout(root, study).prune(trial, report.threshold) for study in studies]
    for path in kept:
        write_text(path, report.model_dump_json(indent=1) + "\n")
    return kept


def load_record(path: Path) -> Record:
    """Read a record; raises ConfigError for one that is damaged or another trial's."""
    content, _ = _content(path)
    return _validated(path, content)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record as plain data, much quicker than `load_record` where it has a seal.

    Raises:
        ConfigError: it is damaged, or another trial's.
    """
    content, had_seal = _content(path)
    try:
        data: Any = from_json(content)
    except ValueError:
        raise _damaged(path, "it is not JSON") from None
    if not had_seal and (why := _missing(data)):  # of a version before seals
        raise _damaged(path, why)
    if data["trial"] != path.stem:
        raise _damaged(path, f"it is trial {data['trial']}'s")
    return dict(data)


def _missing(data: Any) -> str:
    """Return what a record lacks, empty where nothing."""
    if not isinstance(data, dict) or not data.keys() >= _REQUIRED:
        return "it is no whole record"
    history = data["history"]
    if not isinstance(history, list) or not history:
        return "its history is empty"
    for evaluation in history:
        if not isinstance(evaluation, dict) or not isinstance(evaluation.get("bpb", ""), float | int | None):
            return "its history is wrong"
    return ""


def _content(path: Path) -> tuple[bytes, bool]:
    try:
        return unsealed(path.read_bytes())
    except Broken as error:
        raise _damaged(path, str(error)) from None


def _validated(path: Path, content: bytes) -> Record:
    try:
        record = Record.model_validate_json(content)
    except ValidationError as error:
        raise _damaged(path, error.errors()[0]["msg"]) from None
    if not record.history:
        raise _damaged(path, "its history is empty")
    if record.trial != path.stem:
        raise _damaged(path, f"it is trial {record.trial}'s")
    return record


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"result {str(path)!r} is damaged ({why}): `ablate doctor --fix` sets it aside, and the study's next run trains "
        f"it again"
    )


def leaf_deaths(table: Path) -> dict[str, float]:
    """Births and deaths of leaves from a usage table (window `held_out`), for `Record.leaves`; {} without a tree."""
    frame = pl.read_parquet(table, glob=False) if table.exists() else pl.DataFrame()
    if frame.is_empty():
        return {}
    deaths = metrics.deaths(usage.counts_from(frame))
    shares = {name: float(value.mean()) for name, value in deaths.shares().items()}
    ends = {"dead_start": ~deaths.alive_at_start, "dead_end": ~deaths.alive_at_end}
    return shares | {name: float(dead.sum()) for name, dead in ends.items()}


def tree_means(table: Path) -> dict[str, float]:
    """Last evaluation's means over layers and trees, for `Record.trees`; {} without a tree."""
    frame = pl.read_parquet(table, glob=False) if table.exists() else pl.DataFrame()
    if frame.is_empty():
        return {}
    last = frame.filter(pl.col("step") == pl.col("step").max()).drop("step", "layer", "tree")
    means = last.select(pl.all().fill_nan(None).mean()).row(0, named=True)
    return {name: float(value) for name, value in means.items() if value is not None}
