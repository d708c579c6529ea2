"""What a study will cost, predicted from a short run of each shape that it trains."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from ablate.config import Study, Trial
from ablate.config.tune import Trace
from ablate.model.memory import check_memory
from ablate.results.index import Finished, index
from ablate.results.layout import Layout
from ablate.study.address import default_storage, sqlite_path
from ablate.study.designs import Plan, expand
from ablate.study.kernels import compile_kernels
from ablate.study.probes import PROBE_STEPS, Cost, Start, measure
from ablate.study.rates import traces
from ablate.study.space import Space
from ablate.study.tracker import Tracker

# Random candidates of a search; each of its runs is taken to cost their mean.
CANDIDATES = 40
# Parts of a run outside its trials, in starts of a worker's process; imports are most of each (tests/study/timings.json).
COMMAND = 1.2
"""The command itself: its start, and its end once the last worker is gone."""
WORKERS_END = 0.4
"""From the last trial of a phase until its workers are gone."""
NEW_STORES = 0.4
"""Making databases where there are none."""


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
    tracker: Tracker | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Forecast:
    """Predict the wall time from 20-step probes of the cheapest and the dearest shape, run as the workers would run them.

    Of each kind of layer (trees, dense, mixture, none) two shapes are measured; those between follow from their FLOPs.
    Nothing that it trains is kept. `tracker` is the study's, which workers have to load. `say` prints a line of progress.
    Raises ConfigError like `run_study`.
    """
    layout = Layout(root, study.name)
    known, _ = traces(study, layout)
    plan = expand(study, known)
    phases, perhaps = to_do(plan, known, layout)
    check_memory(((one.arm, trial) for phase in phases for one in phase for trial in one.trials), workers)
    costs, start = dict[str, Cost](), Start(0.0, 0.0)
    if shapes := shapes_of(phases):
        chosen = ends(shapes)
        compile_kernels(chosen.values(), root, say)
        say(f"measuring {PROBE_STEPS} steps of {len(chosen)} of {len(shapes)} shapes")
        data_root = data_root or root / "data"
        measured, start = measure(chosen, root=root, data_root=data_root, workers=workers, tracker=tracker)
        costs = between(shapes, measured)
    seconds = priced(phases, costs)
    if study.budget.hours and study.design == "search" and phases[0]:
        phases = _search_to_do(plan, layout, seconds[0][0])
        seconds = priced(phases, costs)
    return Forecast(
        plan=plan,
        seconds=wall(seconds, workers, start, new_stores=not has_stores(root)),
        seconds_more=sum(costs[_shape(trial)].seconds(trial) for trial in perhaps) / workers,
        trials=sum(map(len, phases)),
        tokens=round(sum(mean(t.tokens for t in one.trials) for phase in phases for one in phase)),
        seconds_by_arm={
            one.arm: each
            for phase, of in zip(phases, seconds, strict=True)
            for one, each in zip(phase, of, strict=True)
        },
        space=Space(study).table() if study.design == "search" else [],
    )


@dataclass(frozen=True, slots=True)
class ToDo:
    """A trial that will run."""

    arm: str
    trials: Sequence[Trial]
    """What it may be, each as likely; of a planned trial there is one."""


def priced(phases: Sequence[Sequence[ToDo]], costs: Mapping[str, Cost]) -> list[list[float]]:
    """Return the seconds of each trial to do, from the cost of each shape."""
    return [[mean(costs[_shape(t)].seconds(t) for t in one.trials) for one in phase] for phase in phases]


def wall(phases: Iterable[Sequence[float]], workers: int, start: Start, *, new_stores: bool = False) -> float:
    """Return the seconds from the call of `ablate study run` to its end; 0 where nothing is to do.

    Args:
        phases: seconds of each trial, in the order in which workers take them; every phase has new workers.
        workers: processes at once.
        start: what each of them spends before its trials.
        new_stores: whether the databases have to be made.
    """
    whole = 0.0
    for trials in phases:
        free = [start.process + start.first] * min(workers, len(trials))
        for seconds in trials:
            heapq.heapreplace(free, free[0] + seconds)
        whole += max(free) + WORKERS_END * start.process if free else 0.0
    return whole + (COMMAND + NEW_STORES * new_stores) * start.process if whole else 0.0


def has_stores(root: Path) -> bool:
    """Whether the project has databases already."""
    file = sqlite_path(default_storage(root))
    return file is not None and file.exists()


def to_do(plan: Plan, known: Mapping[str, Trace], layout: Layout) -> tuple[list[list[ToDo]], list[Trial]]:
    """Return the trials to do, phase by phase, and those that a bracket may add."""
    if plan.study.design == "search":
        return _search_to_do(plan, layout), []
    done = layout.done()
    coming, perhaps = to_come(plan, known)
    left = [(t.trial, t.arm) for t in plan.trials if t.hash not in done] + coming
    return [[ToDo(arm, [trial]) for trial, arm in left]], perhaps


def _search_to_do(plan: Plan, layout: Layout, seconds: float | None = None) -> list[list[ToDo]]:
    """Return the runs of a search to do: those of its race, and those of its finalists, which have workers of their own.

    `seconds` is what a run takes, where that is known: a budget of hours then says how many there will be.
    """
    study, space = plan.study, Space(plan.study)
    runs = [run for run in index(layout) if run.space == plan.space]
    finals = study.finalists.count * len(study.finalist_seeds) - sum(run.kind == "finalist" for run in runs)
    drawn = space.possible(np.random.default_rng(0), CANDIDATES, 1000)
    one = ToDo("candidate", [space.trial(space.candidate(chosen), study.seeds[0]) for chosen in drawn])
    race = _race_left(study, [run for run in runs if run.kind == "search"], one, seconds)
    return [[one] * max(0, count) for count in (race, finals)]


def _race_left(study: Study, raced: Sequence[Finished], one: ToDo, seconds: float | None) -> int:
    """Return how many runs the tightest limit of the budget leaves for a race; one where only hours limit it."""
    budget, left = study.budget, [math.inf]
    if budget.trials:
        left.append(study.racing_trials - len(raced))
    if budget.tokens:
        left.append(math.ceil(budget.tokens / mean(t.tokens for t in one.trials)) - len(raced))
    if budget.hours and (hours := budget.hours - sum(run.seconds for run in raced) / 3600) <= 0:
        left.append(0)
    elif budget.hours and seconds:
        left.append(math.ceil(hours * 3600 / seconds))
    return 1 if min(left) == math.inf else int(min(left))


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


def _shape(trial: Trial) -> str:
    """What decides a step's time; seeds, learning rates and lengths do not."""
    train = trial.train.model_dump(
        mode="json",
        include={"batch_size", "accumulate", "precision", "backend", "eval_tokens", "decay_rows", "devices"},
    )
    rest = trial.model_dump(mode="json", include={"task", "corpus", "model", "tree", "dense", "moe"})
    return json.dumps([train, rest], sort_keys=True)


def shapes_of(phases: Iterable[Iterable[ToDo]]) -> dict[str, Trial]:
    """Return every shape that trials to do have, with one of its trials."""
    shapes: dict[str, Trial] = {}
    for trial in (trial for phase in phases for one in phase for trial in one.trials):
        shapes.setdefault(_shape(trial), trial)
    return shapes


def _flops(trial: Trial) -> float:
    from ablate.tasks.registry import planned_cost

    return planned_cost(trial).flops_per_token


def ends(shapes: Mapping[str, Trial]) -> dict[str, Trial]:
    """Return the cheapest and the dearest shape of each kind of layer."""
    kinds: dict[str, list[str]] = {}
    for shape, trial in sorted(shapes.items(), key=lambda item: _flops(item[1])):
        kinds.setdefault(trial.model.feedforward, []).append(shape)
    return {shape: shapes[shape] for ordered in kinds.values() for shape in dict.fromkeys((ordered[0], ordered[-1]))}


def between(shapes: Mapping[str, Trial], measured: Mapping[str, Cost]) -> dict[str, Cost]:
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
