"""How a study stands, from its results and databases, without running anything: `ablate study status` and `plan`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from filelock import FileLock, Timeout
from pydantic import BaseModel

from ablate.config import ConfigError, Study, Trial
from ablate.study.designs import Plan, expand
from ablate.study.records import Layout, load_plan, load_record
from ablate.training.result import Evaluation

PROBE_STEPS = 20
# Of a worker process until its first trial trains: imports of torch, Lightning, Optuna and MLflow.
START_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Finished:
    """One line of the index: what `status` shows of a finished trial."""

    trial: str
    arm: str
    seed: int
    status: str
    bpb: float | None
    seconds: float
    at: float
    """When its result was written, seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """How a study stands now."""

    study: str
    design: str
    total: int
    """Planned trials; 0 for a search bounded by tokens or hours."""
    done: int
    by_status: dict[str, int]
    """Finished trials by status."""
    running: bool
    """Whether a process holds the study's lock."""
    seconds_left: float | None
    """Estimated from the pace of the last 50 trials; None where it is not running or unknown."""
    best: Finished | None
    """Lowest bpb."""
    failures: list[str]
    """Latest errors of trials that have no result, `arm, seed: message`."""


def status(name: str, root: Path, storage: str | None = None) -> StudyStatus:
    """How the study stands. Raises ConfigError where it was never started."""
    layout = Layout(root, name)
    plan = load_plan(layout)
    if plan is None:
        raise ConfigError(f"study {name!r} was never started: run `ablate study run studies/{name}.yaml`")
    planned = {t["trial"] for t in plan["trials"]}
    search = plan["design"] == "search"
    finished = [f for f in _index(layout) if search or f.trial in planned]
    by_status: dict[str, int] = {}
    for one in finished:
        by_status[one.status] = by_status.get(one.status, 0) + 1
    scored = [f for f in finished if f.bpb is not None]
    total = 0 if search else len(planned) + plan["waiting_for_tune"]
    running = is_live(layout)
    return StudyStatus(
        study=name,
        design=plan["design"],
        total=total,
        done=len(finished),
        by_status=by_status,
        running=running,
        seconds_left=_left(finished, total) if running else None,
        best=min(scored, key=lambda f: f.bpb or 0.0, default=None),
        # Where every planned trial has its result there is nothing to ask the database for.
        failures=_failures(f"{name}-{plan['space']}", storage, root, {f.trial for f in finished})
        if search or len(finished) < total
        else [],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a study will cost, before it runs."""

    plan: Plan
    seconds: float
    """Predicted wall time of what is not done yet."""
    trials: int
    """Trials that are not done yet."""
    tokens: int
    """Training tokens of those trials."""
    seconds_by_arm: dict[str, float]
    """Predicted seconds of one trial of each arm, with all workers busy."""


def forecast(study: Study, root: Path, *, workers: int = 1, data_root: Path | None = None) -> Forecast:
    """Predict the wall time from a 20-step probe of each distinct shape, run as the workers would run it.

    Nothing that it trains is kept. Raises ConfigError like `run_study`.
    """
    from ablate.study.probe import measure

    plan = expand(study)
    done = Layout(root, study.name).done()
    if study.design == "search":
        left = max(0, (study.budget.trials or 0) - len(done))
        trials = [study.trial({})] * left
        arms = ["candidate"] * left
    else:
        open_trials = [t for t in plan.trials if t.hash not in done]
        trials, arms = [t.trial for t in open_trials], [t.arm for t in open_trials]
        if study.tune:
            trials += [study.trial(dict(a.changes)) for a in plan.arms for _ in study.seeds]
            arms += [a.label for a in plan.arms for _ in study.seeds]
    costs = measure(_shapes(trials), root=root, data_root=data_root or root / "data", workers=workers)
    each = [costs[_shape(trial)] for trial in trials]
    seconds = sum(c.seconds(t) for c, t in zip(each, trials, strict=True)) / workers
    by_arm = {arm: c.seconds(t) for arm, c, t in zip(arms, each, trials, strict=True)}
    return Forecast(
        plan=plan,
        seconds=seconds + (START_SECONDS if trials else 0.0),
        trials=len(trials),
        tokens=sum(t.tokens for t in trials),
        seconds_by_arm=by_arm,
    )


def _shape(trial: Trial) -> str:
    """What decides a step's time; seeds, learning rates and lengths do not."""
    train = trial.train.model_dump(
        mode="json",
        include={"batch_size", "accumulate", "precision", "backend", "eval_tokens", "decay_rows", "devices"},
    )
    rest = trial.model_dump(mode="json", include={"corpus", "model", "tree", "dense", "moe"})
    return json.dumps([train, rest], sort_keys=True)


def _shapes(trials: Iterable[Trial]) -> dict[str, Trial]:
    shapes: dict[str, Trial] = {}
    for trial in trials:
        shapes.setdefault(_shape(trial), trial)
    return shapes


class _Scored(BaseModel):
    bpb: float | None


class _Shown(BaseModel):
    """What an index keeps of a record; the rest, nearly all of it, is skipped where it is read and never becomes objects."""

    arm: str
    seed: int
    status: str
    seconds: float
    history: list[_Scored]


def _index(layout: Layout) -> list[Finished]:
    """Finished trials, oldest first, from a cache beside the databases: a record is parsed once in its life."""
    cache = layout.state / "index" / f"{layout.study}.jsonl"
    known: dict[str, Finished] = {}
    done = layout.done()
    if cache.exists():
        for line in cache.read_text(encoding="utf-8").splitlines():
            try:
                one = Finished(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue  # Cut short by a crash, or of an older version: its record is read again.
            known[one.trial] = one
    fresh = []
    folder = layout.results
    for name in sorted(done - set(known)):
        with open(f"{folder}/{name}.json", "rb", buffering=0) as file:  # a Path each would take as long as reading
            text, at = file.read(), os.fstat(file.fileno()).st_mtime
        try:
            record = _Shown.model_validate_json(text)
            bpb = record.history[-1].bpb
        except (ValueError, IndexError):
            load_record(layout.record(name))  # Says what is wrong with it.
            raise
        fresh.append(Finished(name, record.arm, record.seed, record.status, bpb, record.seconds, at))
    if fresh:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps({slot: getattr(f, slot) for slot in f.__slots__}) + "\n" for f in fresh)
    return sorted([f for f in (*known.values(), *fresh) if f.trial in done], key=lambda f: f.at)


def _left(finished: list[Finished], total: int) -> float | None:
    recent = finished[-50:]
    if len(recent) < 2 or total <= len(finished):
        return None
    pace = (recent[-1].at - recent[0].at) / (len(recent) - 1)
    return max(0.0, pace * (total - len(finished)) - (time.time() - recent[-1].at))


def is_live(layout: Layout) -> bool:
    """Whether a process on this machine runs the study now."""
    path = layout.state / "locks" / f"{layout.study}.lock"
    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True


def _failures(study: str, storage: str | None, root: Path, done: set[str]) -> list[str]:
    """Errors of failed trials without a result; one query, as loading ten thousand Optuna trials takes seconds."""
    import sqlalchemy  # half of the time that `status` takes to start
    from optuna.trial import TrialState
    from sqlalchemy.engine import make_url

    from ablate.study.queue import ERROR, default_storage

    storage = storage or default_storage(root)
    url = make_url(storage)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return []
    query = sqlalchemy.text(
        "SELECT t.trial_id, a.key, a.value_json FROM trials t JOIN studies s ON s.study_id = t.study_id "
        "JOIN trial_user_attributes a ON a.trial_id = t.trial_id "
        "WHERE s.study_name = :study AND t.state = :state ORDER BY t.trial_id"
    )
    engine = sqlalchemy.create_engine(storage)
    rows: dict[int, dict[str, object]] = {}
    try:
        with engine.connect() as connection:
            for trial, key, value in connection.execute(query, {"study": study, "state": TrialState.FAIL.name}):
                rows.setdefault(trial, {})[key] = json.loads(value)
    finally:
        engine.dispose()
    latest = {str(row.get("trial")): row for row in rows.values() if row.get("trial") not in done and ERROR in row}
    return [f"{row.get('arm', 'candidate')}, seed {row.get('seed', '?')}: {row[ERROR]}" for row in latest.values()]


def evaluations(trial: Trial) -> int:
    """Evaluations of a whole trial: step 0, every `eval_every` steps, the last step."""
    train = trial.train
    return 1 + -(-train.steps // train.eval_every)


def step_seconds(history: list[Evaluation], skip: int) -> float:
    """Median seconds a step between evaluations after the first `skip`, which warm caches up."""
    pairs = zip(history[skip:], history[skip + 1 :], strict=False)
    return median((b.seconds - a.seconds) / (b.step - a.step) for a, b in pairs)
