"""Short runs that measure what a trial's parts and a process's start take, as workers will run them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, median

from ablate.config import Questions, Trial
from ablate.files import working_folder
from ablate.study.threads import available_cpus, threads
from ablate.study.tracker import Tracker
from ablate.training.lifeline import out_of_reach, processes
from ablate.training.result import Evaluation

PROBE_STEPS = 20
# Held-out tokens of a probe's evaluations, where a trial has more.
PROBE_TOKENS = 16384


def evaluations(trial: Trial) -> int:
    """Evaluations of a whole trial: step 0, every `eval_every` steps, the last step."""
    train = trial.train
    return 1 + -(-train.steps // train.eval_every)


def step_seconds(history: list[Evaluation], skip: int) -> float:
    """Median seconds a step between evaluations after the first `skip`, which warm caches up."""
    pairs = zip(history[skip:], history[skip + 1 :], strict=False)
    return median((b.seconds - a.seconds) / (b.step - a.step) for a, b in pairs)


@dataclass(frozen=True, slots=True)
class Cost:
    """Measured seconds of one shape's parts."""

    setup: float
    """Before the first step: data, model, calibration."""
    step: float
    evaluation: float

    def towards(self, other: Cost, part: float) -> Cost:
        """Return the cost at a part (0 to 1) of the way to another."""
        mixed = ((1 - part) * getattr(self, f.name) + part * getattr(other, f.name) for f in fields(self))
        return Cost(*mixed)

    def seconds(self, trial: Trial) -> float:
        """A whole trial of this shape."""
        return self.setup + trial.train.steps * self.step + evaluations(trial) * self.evaluation


@dataclass(frozen=True, slots=True)
class Start:
    """Measured seconds that are spent once in every worker."""

    process: float
    """From asking for a process until it has what a worker imports."""
    first: float
    """What the first trial of a process takes more than the others: kernels are loaded, caches filled."""


def measure(
    shapes: Mapping[str, Trial], *, root: Path, data_root: Path, workers: int, tracker: Tracker | None = None
) -> tuple[dict[str, Cost], Start]:
    """Measure each shape in as many processes at once as there will be workers, with as many threads each.

    `tracker` is only carried into the processes, which import what it needs, as workers do.
    """
    from ablate.tasks.registry import data_card

    data_card(next(iter(shapes.values())), data_root)
    each = max(1, available_cpus() // workers)
    folder = working_folder(root / "state" / "probes", "probe")
    # A single shape is probed in every worker's place at once: workers slow each other down.
    copies = workers if len(shapes) < workers else 1
    jobs = [
        _Probe(trial, data_root, folder / f"{place}.{copy}", each, time.time(), tracker)
        for place, trial in enumerate(shapes.values())
        for copy in range(copies)
    ]
    try:
        with processes(workers) as pool:
            with threads(each), out_of_reach():
                probing = pool.map(_probe, jobs)
            answers = list(probing)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    costs = [cost for cost, _ in answers]
    found = {
        shape: Cost(*(mean(getattr(c, f.name) for c in costs[i * copies : (i + 1) * copies]) for f in fields(Cost)))
        for i, shape in enumerate(shapes)
    }
    starts = [start for _, start in answers if start]
    return found, Start(mean(s.process for s in starts), mean(s.first for s in starts))


@dataclass(frozen=True, slots=True)
class _Probe:
    """One shape to measure in a process of its own."""

    trial: Trial
    data_root: Path
    folder: Path
    threads: int
    asked: float
    """When its process was asked for, seconds since the epoch."""
    tracker: Tracker | None

    def short(self, steps: int, **changes: int) -> Trial:
        """Return the trial with few steps and evaluations, and no questions."""
        train = self.trial.train.model_copy(
            update={"steps": steps, "eval_every": 10, "checkpoint_every": steps, "keep_checkpoint": False, **changes}
        )
        return self.trial.model_copy(update={"train": train, "questions": Questions()})


class _Clock:
    """Times a trial from outside: evaluations as they pass."""

    def __init__(self) -> None:
        self.evaluated_at: list[float] = []

    def evaluated(self, evaluation: Evaluation) -> bool:
        self.evaluated_at.append(time.perf_counter())
        return False

    def stepped(self, step: int, total: int) -> bool:
        return False


_probed: list[str] = []
"""Folders of the probes that this process has run."""


def _probe(job: _Probe) -> tuple[Cost, Start | None]:
    import ablate.study.worker  # noqa: F401 - a worker has it before its first trial
    from ablate.training.trial import run_trial

    imported, trial, folder = time.time() - job.asked, job.trial, job.folder
    least = 64 * trial.tree.leaves
    # The first trial of a process also loads kernels and fills caches; only the second says what all the others take.
    warm = job.short(2, eval_tokens=max(4096, least))
    started = time.perf_counter()
    run_trial(warm, data_root=job.data_root, folder=folder / "warm", threads=job.threads, resume=False)
    warmed = time.perf_counter() - started
    clock = _Clock()
    started = time.perf_counter()
    tokens = min(trial.train.eval_tokens, max(PROBE_TOKENS, least))
    result = run_trial(
        job.short(PROBE_STEPS, eval_tokens=tokens),
        data_root=job.data_root,
        folder=folder / "timed",
        observer=clock,
        threads=job.threads,
        resume=False,
    )
    step = step_seconds(result.history, skip=1)
    whole = clock.evaluated_at[-1] - clock.evaluated_at[0]
    evaluation = max(0.0, (whole - result.history[-1].seconds) / (len(result.history) - 1)) / tokens
    ended = time.perf_counter() - clock.evaluated_at[-1]
    setup = max(0.0, clock.evaluated_at[0] - started - evaluation * tokens) + ended
    again = Cost(setup, step, evaluation * warm.train.eval_tokens).seconds(warm)
    first = None if _probed else Start(imported, max(0.0, warmed - again))
    _probed.append(str(folder))
    return Cost(setup, step, evaluation * trial.train.eval_tokens), first
