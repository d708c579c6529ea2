"""A 20-step probe of each shape that a study trains, for predicting its wall time."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from ablate.config import Questions, Trial
from ablate.study.engines import THREAD_VARIABLES, _environment, available_cpus
from ablate.study.status import PROBE_STEPS, evaluations, step_seconds
from ablate.training.result import Evaluation


@dataclass(frozen=True, slots=True)
class Cost:
    """Measured seconds of one shape's parts."""

    setup: float
    """Before the first step: data, model, calibration."""
    step: float
    evaluation: float

    def seconds(self, trial: Trial) -> float:
        """A whole trial of this shape."""
        return self.setup + trial.train.steps * self.step + evaluations(trial) * self.evaluation


def measure(shapes: Mapping[str, Trial], *, root: Path, data_root: Path, workers: int) -> dict[str, Cost]:
    """Measure each shape in as many processes at once as there will be workers, with as many threads each."""
    from ablate.data.tokens import prepare

    if not shapes:
        return {}
    prepare(next(iter(shapes.values())).corpus, data_root)
    threads = max(1, available_cpus() // workers)
    scratch = root / "state" / "probes"
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    jobs = [(trial, data_root, folder / str(i), threads) for i, trial in enumerate(shapes.values())]
    # A single shape is probed in every worker's place at once: workers slow each other down.
    padded = [
        (t, d, f.with_name(f"{f.name}.{copy}"), n) for t, d, f, n in jobs for copy in range(_copies(len(jobs), workers))
    ]
    try:
        # Not a multiprocessing.Pool: its processes may not have children, which a trial on several devices needs.
        with (
            _environment(dict.fromkeys(THREAD_VARIABLES, str(threads))),
            ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        ):
            costs = list(pool.map(_probe, *zip(*padded, strict=True)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    copies = len(padded) // len(jobs)
    found = {}
    for i, shape in enumerate(shapes):
        group = costs[i * copies : (i + 1) * copies]
        found[shape] = Cost(*(mean(getattr(c, part) for c in group) for part in ("setup", "step", "evaluation")))
    return found


def _copies(shapes: int, workers: int) -> int:
    return workers if shapes < workers else 1


class _Clock:
    """Times a trial from outside: evaluations and steps as they pass."""

    def __init__(self) -> None:
        self.evaluated_at: list[float] = []

    def evaluated(self, evaluation: Evaluation) -> bool:
        self.evaluated_at.append(time.perf_counter())
        return False

    def stepped(self, step: int, total: int) -> bool:
        return False


def _probe(trial: Trial, data_root: Path, folder: Path, threads: int) -> Cost:
    from ablate.training.trial import run_trial

    def short(steps: int, **changes: int) -> Trial:
        train = trial.train.model_copy(
            update={"steps": steps, "eval_every": 10, "checkpoint_every": steps, "keep_checkpoint": False, **changes}
        )
        return trial.model_copy(update={"train": train, "questions": Questions()})

    # The first trial of a process also compiles kernels and fills caches; only the second is timed.
    warm = short(2, eval_tokens=max(4096, 64 * trial.tree.leaves))
    run_trial(warm, data_root=data_root, folder=folder.with_name(f"{folder.name}.warm"), threads=threads, resume=False)
    clock = _Clock()
    started = time.perf_counter()
    result = run_trial(
        short(PROBE_STEPS), data_root=data_root, folder=folder, observer=clock, threads=threads, resume=False
    )
    step = step_seconds(result.history, skip=1)
    whole = clock.evaluated_at[-1] - clock.evaluated_at[0]
    evaluation = max(0.0, (whole - result.history[-1].seconds) / (len(result.history) - 1))
    ended = time.perf_counter() - clock.evaluated_at[-1]
    return Cost(setup=max(0.0, clock.evaluated_at[0] - started - evaluation) + ended, step=step, evaluation=evaluation)
