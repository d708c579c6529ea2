"""What a study will cost, predicted from a short run of each shape that it trains."""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, median

import numpy as np

from ablate.config import Questions, Study, Trial
from ablate.config.tune import Trace
from ablate.results.layout import Layout
from ablate.study.designs import Plan, expand
from ablate.study.engines import THREAD_VARIABLES, available_cpus, environment
from ablate.study.kernels import compile_kernels
from ablate.study.rates import traces
from ablate.study.space import Space
from ablate.training.lifeline import COLLECT_AFTER
from ablate.training.result import Evaluation

PROBE_STEPS = 20
# Held-out tokens of a probe's evaluations, where a trial has more.
PROBE_TOKENS = 16384
# Of a worker process until its first trial trains: imports of torch, Lightning, Optuna and MLflow.
START_SECONDS = 8.0
# Random candidates of a search whose mean cost is taken for all.
CANDIDATES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a study will cost, before it runs."""

    plan: Plan
    seconds: float
    """Predicted wall time of what is not done yet, at the least where learning rates are still tuned."""
    seconds_more: float
    """What brackets may add, where every arm tries as many rates as it may."""
    trials: int
    """Trials that are not done yet."""
    tokens: int
    """Training tokens of those trials."""
    seconds_by_arm: dict[str, float]
    """Predicted seconds of one trial of each arm, with all workers busy."""
    space: list[tuple[str, str, str]]
    """For a search, each factor with its values and where it exists."""


def forecast(
    study: Study,
    root: Path,
    *,
    workers: int = 1,
    data_root: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Forecast:
    """Predict the wall time from 20-step probes of the cheapest and the dearest shape, run as the workers would run them.

    Of each kind of layer (trees, dense, mixture, none) two shapes are measured; those between follow from their FLOPs.
    Nothing that it trains is kept. `say` prints a line of progress. Raises ConfigError like `run_study`.
    """
    layout = Layout(root, study.name)
    done = layout.done()
    known, _ = traces(study, layout)
    plan = expand(study, known)
    if study.design == "search":
        trials, arms = _candidates(study, max(0, (study.budget.trials or 0) - len(done)))
        perhaps: list[Trial] = []
    else:
        open_trials = [t for t in plan.trials if t.hash not in done]
        trials, arms = [t.trial for t in open_trials], [t.arm for t in open_trials]
        coming, perhaps = to_come(plan, known)
        trials += [trial for trial, _ in coming]
        arms += [arm for _, arm in coming]
    shapes = _shapes(trials)
    ends = _ends(shapes)
    if ends:
        compile_kernels(ends.values(), root, say)
        say(f"measuring {PROBE_STEPS} steps of {len(ends)} of {len(shapes)} shapes")
    costs = _between(shapes, measure(ends, root=root, data_root=data_root or root / "data", workers=workers))
    each = [costs[_shape(trial)] for trial in trials]
    seconds = sum(c.seconds(t) for c, t in zip(each, trials, strict=True)) / workers
    by_arm = {arm: c.seconds(t) for arm, c, t in zip(arms, each, trials, strict=True)}
    return Forecast(
        plan=plan,
        seconds=seconds + (START_SECONDS if trials else 0.0),
        seconds_more=sum(costs[_shape(trial)].seconds(trial) for trial in perhaps) / workers,
        trials=len(trials),
        tokens=sum(t.tokens for t in trials),
        seconds_by_arm=by_arm,
        space=Space(study).table() if study.design == "search" else [],
    )


def to_come(plan: Plan, known: Mapping[str, Trace]) -> tuple[list[tuple[Trial, str]], list[Trial]]:
    """Return trials that the plan does not list yet, of arms whose rate is not known: those that must come, with their
    arms, and those that a bracket may add."""
    study = plan.study
    certain: list[tuple[Trial, str]] = []
    perhaps: list[Trial] = []
    for arm in plan.arms if study.tune else ():
        trace = known[arm.label]
        if study.tune is None or trace.chosen is not None:
            continue
        trial, seeds = study.trial(dict(arm.changes)), len(study.tune.seeds)
        certain += [(trial, arm.label)] * ((trace.least - len(trace.rounds)) * seeds + len(study.seeds))
        perhaps += [trial] * ((study.tune.limits[1] - trace.least) * seeds)
    return certain, perhaps


def _candidates(study: Study, count: int) -> tuple[list[Trial], list[str]]:
    """Return trials like those of a search: a few random candidates in turn."""
    space = Space(study)
    drawn = space.possible(np.random.default_rng(0), CANDIDATES, 1000)
    some = [space.trial(space.candidate(chosen), study.seeds[0]) for chosen in drawn]
    return [some[i % len(some)] for i in range(count)], ["candidate"] * count


def _shape(trial: Trial) -> str:
    """What decides a step's time; seeds, learning rates and lengths do not."""
    train = trial.train.model_dump(
        mode="json",
        include={"batch_size", "accumulate", "precision", "backend", "eval_tokens", "decay_rows", "devices"},
    )
    rest = trial.model_dump(mode="json", include={"task", "corpus", "model", "tree", "dense", "moe"})
    return json.dumps([train, rest], sort_keys=True)


def _shapes(trials: Iterable[Trial]) -> dict[str, Trial]:
    shapes: dict[str, Trial] = {}
    for trial in trials:
        shapes.setdefault(_shape(trial), trial)
    return shapes


def _flops(trial: Trial) -> float:
    from ablate.tasks.registry import planned_cost

    return planned_cost(trial).flops_per_token


def _ends(shapes: Mapping[str, Trial]) -> dict[str, Trial]:
    """Return the cheapest and the dearest shape of each kind of layer."""
    kinds: dict[str, list[str]] = {}
    for shape, trial in sorted(shapes.items(), key=lambda item: _flops(item[1])):
        kinds.setdefault(trial.model.feedforward, []).append(shape)
    return {shape: shapes[shape] for ordered in kinds.values() for shape in dict.fromkeys((ordered[0], ordered[-1]))}


def _between(shapes: Mapping[str, Trial], measured: Mapping[str, Cost]) -> dict[str, Cost]:
    """Return the cost of every shape: as measured, or between the two of its kind in proportion to FLOPs."""
    found = dict(measured)
    for shape, trial in shapes.items():
        if shape not in found:
            kind = trial.model.feedforward
            low, high = sorted(
                (s for s in measured if shapes[s].model.feedforward == kind), key=lambda s: _flops(shapes[s])
            )
            span = _flops(shapes[high]) - _flops(shapes[low])
            part = (_flops(trial) - _flops(shapes[low])) / span if span else 0.5
            found[shape] = measured[low].towards(measured[high], part)
    return found


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


def measure(shapes: Mapping[str, Trial], *, root: Path, data_root: Path, workers: int) -> dict[str, Cost]:
    """Measure each shape in as many processes at once as there will be workers, with as many threads each."""
    from ablate.tasks.registry import data_card

    if not shapes:
        return {}
    data_card(next(iter(shapes.values())), data_root)
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
            environment(dict.fromkeys(THREAD_VARIABLES, str(threads))),
            ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), gc.set_threshold, (COLLECT_AFTER,)
            ) as pool,
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
    tokens = min(trial.train.eval_tokens, max(PROBE_TOKENS, 64 * trial.tree.leaves))
    result = run_trial(
        short(PROBE_STEPS, eval_tokens=tokens),
        data_root=data_root,
        folder=folder,
        observer=clock,
        threads=threads,
        resume=False,
    )
    step = step_seconds(result.history, skip=1)
    whole = clock.evaluated_at[-1] - clock.evaluated_at[0]
    evaluation = max(0.0, (whole - result.history[-1].seconds) / (len(result.history) - 1))
    ended = time.perf_counter() - clock.evaluated_at[-1]
    setup = max(0.0, clock.evaluated_at[0] - started - evaluation) + ended
    return Cost(setup=setup, step=step, evaluation=evaluation * trial.train.eval_tokens / tokens)
