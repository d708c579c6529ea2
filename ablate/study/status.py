"""How far a study is, from its results and databases, without running anything: `ablate study status`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ablate.config import ConfigError, masked
from ablate.results.index import Finished, index
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.study.address import DATABASES, check_address, connect_arguments, default_storage, refusals, sqlite_path
from ablate.study.leaders import Leader, leaders


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How far the learning rates of a study are."""

    done: int
    """Finished tuning trials."""
    least: int
    """Tuning trials in the end, at the least."""
    most: int
    arms: int
    settled: int
    """Arms whose rate is known."""
    bound: list[str]
    """Arms whose rate is a bound, not an optimum."""

    def __str__(self) -> str:
        of = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        bound = f"; a bound, not an optimum: {', '.join(self.bound)}" if self.bound else ""
        return f"{self.done} of {of} trials, {self.settled} of {self.arms} arms have their rate{bound}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """The present state of a study."""

    study: str
    design: str
    total: int
    """Planned trials, at the least where rates are still tuned; 0 for a search bounded by tokens or hours."""
    done: int
    by_status: dict[str, int]
    """Finished trials by status."""
    running: bool
    """Whether a process holds the study's lock."""
    seconds_left: float | None
    """Estimated from the pace of the last 50 trials; None where it is not running or unknown."""
    best: list[Leader]
    """The leading arm on each objective, by its mean over seeds; finalists only, once there are any."""
    tuning: Tuning | None
    """Its learning rates; None where they are not tuned."""
    candidates: int | None
    """Candidates of a search so far; None for other designs."""
    waiting: list[str]
    """Candidates that the budget cut off before they had all seeds: a larger budget goes on with them first."""
    storage: str
    """Optuna's database and the study's name in it, without a password."""
    failures: list[str]
    """Latest errors of trials that have no result, `arm, seed: message`."""


def status(name: str, root: Path, storage: str | None = None) -> StudyStatus:
    """Return the study's state. Raises ConfigError where it was never started."""
    storage = storage or default_storage(root)
    check_address("storage", storage, DATABASES)
    layout = Layout(root, name)
    plan = load_plan(layout)
    if plan is None:
        raise ConfigError(f"study {name!r} was never started: run `ablate study run studies/{name}.yaml`")
    planned = {t["trial"] for t in plan["trials"]}
    search = plan["design"] == "search"
    finished = [f for f in index(layout) if (f.space == plan["space"] if search else f.trial in planned)]
    by_status: dict[str, int] = {}
    for one in finished:
        by_status[one.status] = by_status.get(one.status, 0) + 1
    tuning = _tuning(plan, finished)
    total = (plan["search"]["budget"]["trials"] or 0) if search else _total(plan, tuning)
    running = is_live(layout)
    study = f"{name}-{plan['space']}"
    return StudyStatus(
        study=name,
        design=plan["design"],
        total=total,
        done=len(finished),
        by_status=by_status,
        running=running,
        seconds_left=_left(finished, total) if running else None,
        best=_best(plan["objectives"], finished),
        tuning=tuning,
        candidates=len({f.arm for f in finished if f.kind == "search"}) if search else None,
        waiting=_waiting(plan["search"], finished) if search else [],
        storage=f"{masked(storage)}, study {study}",
        # Where every planned trial has its result there is nothing to ask the database for.
        failures=_failures(study, storage, {f.trial for f in finished}) if search or len(finished) < total else [],
    )


def _tuning(plan: dict[str, Any], finished: list[Finished]) -> Tuning | None:
    planned = sum(t["kind"] == "tune" for t in plan["trials"])
    if not planned:
        return None
    known = plan.get("tuning", {"least": planned, "most": planned})  # plans before brackets
    return Tuning(
        done=sum(f.kind == "tune" for f in finished),
        least=known["least"],
        most=known["most"],
        arms=len(plan["arms"]),
        settled=len(plan["tuned"]),
        bound=[arm for arm, found in plan["tuned"].items() if found["at_edge"]],
    )


def _total(plan: dict[str, Any], tuning: Tuning | None) -> int:
    others: int = plan["waiting_for_tune"] + sum(t["kind"] != "tune" for t in plan["trials"])
    return others + (tuning.least if tuning else 0)


def _waiting(search: dict[str, Any], finished: list[Finished]) -> list[str]:
    """Return the candidates that waited when the race was last over and have not had all seeds since."""
    seeds: dict[str, set[int]] = {}
    for one in finished:
        if one.kind == "search":
            seeds.setdefault(one.arm, set()).add(one.seed)
    noted = [row["arm"] for row in search.get("candidates", []) if row.get("waits")]
    return [arm for arm in noted if not set(search["race_seeds"]) <= seeds.get(arm, set())]


def _best(objectives: list[str], finished: list[Finished]) -> list[Leader]:
    """Return the leaders, of finalists where there are any: racing means of the best look better than they are."""
    kinds = {f.kind for f in finished}
    kind = "finalist" if "finalist" in kinds else "search" if "search" in kinds else ""
    values: dict[str, dict[int, list[float]]] = {}
    for one in finished:
        if one.status == "finished" and one.kind not in {"tune", "control"} and one.kind == (kind or one.kind):
            numbers = [one.values.get(name) for name in objectives]
            known = [v for v in numbers if v is not None]
            if len(known) == len(numbers):
                values.setdefault(one.arm, {})[one.seed] = known
    return leaders(objectives, values)


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


def _failures(study: str, storage: str, done: set[str]) -> list[str]:
    """Errors of failed trials without a result; one query, as loading ten thousand Optuna trials takes seconds."""
    import sqlalchemy  # half of the time that `status` takes to start

    query = sqlalchemy.text(
        "SELECT t.trial_id, a.key, a.value_json FROM trials t JOIN studies s ON s.study_id = t.study_id "
        "JOIN trial_user_attributes a ON a.trial_id = t.trial_id "
        "WHERE s.study_name = :study AND t.state = :state ORDER BY t.trial_id"
    )
    rows: dict[int, dict[str, object]] = {}
    with refusals("storage", storage):
        from optuna.trial import TrialState

        from ablate.study.queue import ERROR

        file = sqlite_path(storage)
        if file is not None and not (file.exists() and file.stat().st_size):
            return []
        engine = sqlalchemy.create_engine(storage, connect_args={} if file else connect_arguments(storage))
        try:
            with engine.connect() as connection:
                for trial, key, value in connection.execute(query, {"study": study, "state": TrialState.FAIL.name}):
                    rows.setdefault(trial, {})[key] = json.loads(value)
        finally:
            engine.dispose()
    latest = {str(row.get("trial")): row for row in rows.values() if row.get("trial") not in done and ERROR in row}
    return [f"{row.get('arm', 'candidate')}, seed {row.get('seed', '?')}: {row[ERROR]}" for row in latest.values()]
