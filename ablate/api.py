"""Studies from Python: `run_study` runs one, `load` gives its results as polars frames."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from ablate.analysis.findings import compute
from ablate.analysis.frames import Tables
from ablate.analysis.frames import load as load_tables
from ablate.balance import metrics
from ablate.config import ConfigError, Study, load_study
from ablate.config.drafts import placed_study
from ablate.files import write_text
from ablate.report.published import staged
from ablate.results.collect import collect
from ablate.results.export import to_csv, to_tensorboard
from ablate.results.layout import Layout

BALANCE = {"n_eff_frac": metrics.n_eff_frac, "dead_frac": metrics.dead_frac, "max_vio": metrics.max_vio}
"""Metrics of one tree in `Results.balance`; the glossary says what they are."""


@dataclass(frozen=True)
class Results:
    """The results of a study as polars frames."""

    name: str
    trials: pl.DataFrame
    """One row a trial: arm, seed, status, settings, final quality and balance, cost."""
    history: pl.DataFrame
    """One row an evaluation of a trial: step, bits per byte, training loss, balance."""
    balance: pl.DataFrame
    """One row a tree, evaluation and trial: share of leaves in effective use, share of dead leaves, most loaded leaf.
    Of a published study, the evaluations of which git keeps the usage."""
    tables: Tables
    """The tables as the analysis reads them."""

    @cached_property
    def findings(self) -> dict[str, Any]:
        """Everything that the study showed, as in findings.json; computed at first use."""
        return compute(self.tables)

    @cached_property
    def verdicts(self) -> pl.DataFrame:
        """One row a comparison: effect with its 95% interval, adjusted p, verdict, and the sentence that says it."""
        columns = ("family", "arm_label", "reference_label", "endpoint", "effect", "p_adjusted", "verdict", "n", "text")
        rows = [
            {**{c: f.get(c) for c in columns}, **dict(zip(("low", "high"), f["interval"] or (None, None), strict=True))}
            for f in self.findings["findings"]
        ]
        order = [*columns[:5], "low", "high", *columns[5:]]
        return pl.DataFrame(rows, infer_schema_length=None).select(order) if rows else pl.DataFrame(schema=order)

    def to_csv(self, folder: Path | str) -> Path:
        """Write trials.csv, history.csv, balance.csv and verdicts.csv; return the folder."""
        frames = {name: getattr(self, name) for name in ("trials", "history", "balance", "verdicts")}
        return to_csv(frames, Path(folder))

    def to_tensorboard(self, folder: Path | str) -> Path:
        """Write an event file a trial, with its curves, for `tensorboard --logdir`; return the folder."""
        return to_tensorboard(self.history, Path(folder))


def run_study(study: Study | Path | str, root: Path | str = ".", *, workers: int = 1, track: bool = False) -> Results:
    """Run every trial of a study that has no result yet, and return its results.

    A script that calls this needs `if __name__ == "__main__":`, because workers are processes that import it.

    Args:
        study: a study, or the path of a study file. A study made in code is written to root/studies/<name>.yaml.
        root: the project: results/, tables/ and state/ are made in it.
        workers: processes; threads are divided among them.
        track: keep the runs in MLflow, as `ablate study run` does.

    Raises:
        ConfigError: a setting is not allowed, or there is another study of that name.
        RuntimeError: trials failed, or the run was stopped; calling again goes on.
    """
    from ablate.study.runner import run_study as run

    root = Path(root)
    known = _kept(study, root) if isinstance(study, Study) else placed_study(Path(study), root)
    tracker = None
    if track:
        from ablate.tracking.store import default_uri
        from ablate.tracking.tracker import MlflowTracker

        tracker = MlflowTracker(default_uri(root.resolve()))
    outcome = run(known, root, workers=workers, tracker=tracker)
    if outcome.exit_code:
        raise RuntimeError("; ".join([*outcome.failed, outcome.message]).strip("; ") or f"signal {outcome.signal}")
    return load(known.name, root)


def load(name: str, root: Path | str = ".") -> Results:
    """Return the results of a study: your own, or else the published ones in root/reports.

    Raises:
        ConfigError: there are neither.
    """
    root = Path(root)
    layout = Layout(root, name)
    if layout.plan.exists():
        collect(name, root)
    if layout.tables.exists() or not layout.published.exists():
        return _results(load_tables(name, root))
    place = tempfile.TemporaryDirectory()
    staged(name, root, Path(place.name))
    results = _results(load_tables(name, Path(place.name)))
    weakref.finalize(results, place.cleanup)  # some tables are read when they are asked for
    return results


def _results(tables: Tables) -> Results:
    return Results(tables.name, tables.trials, tables.history, _balance(tables.usage), tables)


def _balance(usage: pl.LazyFrame | None) -> pl.DataFrame:
    """Return BALANCE of every tree whose leaf counts a usage table has."""
    keys = ["trial", "arm", "seed", "step", "layer", "tree"]
    if usage is None:
        return pl.DataFrame(schema=[*keys, *BALANCE])
    leaves = usage.filter(pl.col("window") == "held_out", pl.col("level") == pl.col("level").max().over("trial"))
    counts = leaves.sort(*keys, "index").group_by(keys, maintain_order=True).agg("count").collect()
    parts = []
    for (size,), group in counts.group_by(pl.col("count").list.len()):
        array = np.array(group["count"].to_list(), dtype=np.int64).reshape(len(group), int(str(size)))
        parts.append(group.select(keys).with_columns(pl.Series(n, f(array)) for n, f in BALANCE.items()))
    return pl.concat(parts).sort(keys) if parts else pl.DataFrame(schema=[*keys, *BALANCE])


def _kept(study: Study, root: Path) -> Study:
    """Write a study to its place in the project, where the analysis reads it, and return it."""
    path = root / "studies" / f"{study.name}.yaml"
    if not path.exists():
        settings = study.model_dump(mode="json", exclude_unset=True)
        write_text(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120))
    elif load_study(path) != study:
        raise ConfigError(f"study file {str(path)!r} has other settings: give the study another name")
    return study
