"""`ablate bench tasks`: seconds of a whole trial of each task, with its evaluations, balance metrics and files."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablate.config import PRESETS, Trial
from ablate.tasks.registry import tasks
from ablate.training.trial import run_trial

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    # The model of the study `first`, the default of `make repro`.
    "language": {
        "corpus": {"vocab_size": 1024},
        "model": {"context": 128, "blocks": 2},
        "train": {"steps": 400, "batch_size": 4, "lr": 0.004, "eval_every": 200, "eval_tokens": 65536},
    },
    **{kind: PRESETS[kind] for kind in tasks() if kind != "language"},
}
"""The settings of each task's trial: those that its shipped studies start from."""
WARM_STEPS = 4


def run(
    kinds: Sequence[str], data_root: Path, *, threads: int = 1, steps: int | None = None, as_json: bool = False
) -> list[dict[str, Any]]:
    """Time one whole trial of each task with trees and with a dense layer of all their units.

    A short trial comes first, so that compiling kernels and preparing a corpus are not counted: a study does both once.

    Rows: task, contender, threads, steps, evaluations, seconds (of the whole trial), training (seconds in steps), trials_an_hour
    (on these threads).
    """
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        tree = Trial.model_validate(SIZES[kind])
        for contender, trial in {"tree": tree, "dense_total": _dense(tree)}.items():
            row = _timed(trial, data_root, threads, steps or trial.train.steps)
            rows.append({"task": kind, "contender": contender, **row})
            if as_json:
                print(json.dumps(rows[-1]), flush=True)
    return rows


def _dense(tree: Trial) -> Trial:
    model = tree.model.model_copy(update={"feedforward": "dense"})
    dense = tree.dense.model_copy(update={"width": tree.tree.total_units})
    return tree.model_copy(update={"model": model, "dense": dense})


def _timed(trial: Trial, data_root: Path, threads: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ablate-bench-") as folder:
        for place, count in (("warm", min(WARM_STEPS, steps)), ("timed", steps)):
            train = trial.train.model_copy(update={"steps": count, "eval_every": min(trial.train.eval_every, count)})
            started = time.perf_counter()
            result = run_trial(
                trial.model_copy(update={"train": train}),
                data_root=data_root,
                folder=Path(folder) / place,
                threads=threads,
            )
            seconds = time.perf_counter() - started
    return {
        "threads": threads,
        "steps": steps,
        "evaluations": len(result.history),
        "seconds": seconds,
        "training": result.final.seconds,
        "trials_an_hour": 3600 / seconds,
    }
