"""`ablate doctor`: do results, Optuna's trials, MLflow's runs, checkpoints and DVC agree, and if not, make them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from ablate.config import ConfigError
from ablate.files import leftovers, stale_folders
from ablate.results import layout as files
from ablate.results.intact import problems, set_aside
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.results.record import load_record
from ablate.study.address import (
    DATABASES,
    DamagedStore,
    check_address,
    check_file,
    default_storage,
    refusals,
    set_aside_database,
    sqlite_path,
)
from ablate.study.checkout import checkout_id, study_name
from ablate.study.engines import host
from ablate.study.queue import ERROR, HASH, WORKER
from ablate.study.status import is_live
from ablate.study.storage import open_storage
from ablate.tracking import tags
from ablate.tracking.spool import Spool, spool_path
from ablate.tracking.store import STORES, default_uri, prepare_store, runs_of, sqlite_file
from ablate.tracking.tracker import MlflowTracker

KEPT = {files.MODEL, files.PRUNED, files.EVALUATION, files.ITEMS}
"""Files that stay in a finished trial's folder: training's, `ablate prune`'s and `ablate evaluate`'s."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Something that does not agree."""

    study: str
    problem: str
    remedy: str
    """What `fix` does about it, or what the user can do."""
    fixed: bool


def doctor(
    root: Path, fix: bool = False, *, storage: str | None = None, tracking: str | None = None
) -> list[Disagreement]:
    """Look at every study of the project; with `fix`, repair what can be repaired. Live studies are left alone.

    Raises:
        ConfigError: a database is there but cannot be opened.
    """
    root = root.resolve()
    names = {p.name for p in (root / "results").glob("*") if p.is_dir()}
    names |= {p.name for p in (root / "state" / "spool").glob("*") if p.is_dir()}
    lines = sorted(name for name in names if not is_live(Layout(root, name)))
    findings: list[Disagreement] = []
    optuna = client = None
    storage, tracking = storage or default_storage(root), tracking or default_uri(root)
    own = len(lines) == len(names)
    try:
        optuna = _existing_storage(storage)
    except DamagedStore:
        if storage != default_storage(root):
            raise
        findings.append(_rebuilt("Optuna's database", storage, fix and own))
    try:
        client = _existing_store(tracking)
    except DamagedStore:
        if tracking != default_uri(root):
            raise
        findings.append(_rebuilt("MLflow's database", tracking, fix and own))
    for name in lines:
        layout = Layout(root, name)
        findings += _all(name, _files(layout, fix))
        findings += _all(name, _checkpoints(layout, fix))
        if optuna:
            findings += _all(name, _trials(layout, optuna, fix), ("storage", storage))
        if client:
            findings += _all(name, _Runs(layout, client, tracking, fix).check(), ("tracking", tracking))
    findings += _drawn(root, fix)
    findings += _pipeline(root)
    return findings


def _all(name: str, check: Iterator[Disagreement], store: tuple[str, str] | None = None) -> list[Disagreement]:
    """Return what a check finds; one that cannot go on, say as its store is gone, does not keep the others from theirs."""
    found: list[Disagreement] = []
    try:
        with refusals(*store) if store else nullcontext():
            found.extend(check)
    except ConfigError as error:
        found.append(Disagreement(name, str(error), "see there", False))
    return found


def _rebuilt(what: str, url: str, fix: bool) -> Disagreement:
    if fix:
        set_aside_database(url)
    remedy = "move it to state/damaged; the next run of a study makes it new from plan and results"
    return Disagreement("", f"{what} is damaged", remedy, fix)


def _drawn(root: Path, fix: bool) -> Iterator[Disagreement]:
    """Folders that a killed `ablate publish` or `ablate figures` left among the reports."""
    for path in stale_folders(root / "reports"):
        if fix:
            shutil.rmtree(path, ignore_errors=True)
        yield Disagreement("", f"half-drawn report {path.name}", "delete it", fix)


def _existing_storage(url: str) -> RDBStorage | None:
    check_address("storage", url, DATABASES)
    check_file("storage", url)
    file = sqlite_path(url)
    return None if file is not None and not file.exists() else open_storage(url)


def _existing_store(uri: str) -> MlflowClient | None:
    check_address("tracking", uri, STORES)
    check_file("tracking", uri)
    file = sqlite_file(uri)
    return None if file is not None and not file.exists() else prepare_store(uri)


def _files(layout: Layout, fix: bool) -> Iterator[Disagreement]:
    """Half-written and damaged files among the results."""
    for path in leftovers(layout.results):
        if fix:
            path.unlink(missing_ok=True)
        yield Disagreement(layout.study, f"half-written file {path.name}", "delete it", fix)
    yield from _plan(layout, fix)
    done, prunes = layout.done(), layout.prunes()
    for name, problem in problems(layout, sorted(done), thorough=True).items():
        if fix:
            set_aside(layout, name)
        yield Disagreement(layout.study, str(problem), "move the trial to state/damaged; it is run again", fix)
    for path in sorted(layout.results.glob("*.parquet")):
        if path.name.partition(".")[0] not in done:
            if fix:
                path.unlink(missing_ok=True)
            yield Disagreement(
                layout.study, f"table {path.name} without its result", "delete it; its trial is run again", fix
            )
    for path in (p for name, found in prunes.items() if name not in done for p in found):
        if fix:
            path.unlink(missing_ok=True)
        yield Disagreement(layout.study, f"prune result {path.name} without its trial's", "delete it", fix)


def _plan(layout: Layout, fix: bool) -> Iterator[Disagreement]:
    try:
        load_plan(layout)
    except ConfigError:
        if fix:
            aside = layout.state / "damaged" / layout.study
            aside.mkdir(parents=True, exist_ok=True)
            layout.plan.replace(aside / layout.plan.name)
        yield Disagreement(
            layout.study, f"damaged plan {layout.plan.name}", "move it to state/damaged; the next run writes it", fix
        )


def _whole_plan(layout: Layout) -> dict[str, Any] | None:
    """Return the plan, None also where it is damaged, which `_plan` says."""
    try:
        return load_plan(layout)
    except ConfigError:
        return None


def _checkpoints(layout: Layout, fix: bool) -> Iterator[Disagreement]:
    """Checkpoints that nothing will go on from."""
    for name in sorted(layout.done()):
        left = [p for p in layout.folder(name).glob("*") if p.name not in KEPT]
        if left:
            for path in left if fix else []:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield Disagreement(layout.study, f"checkpoints of the finished trial {name}", "delete them", fix)


def _trials(layout: Layout, storage: RDBStorage, fix: bool) -> Iterator[Disagreement]:
    """Optuna trials left RUNNING without a worker, and finished ones still waiting."""
    done = layout.done()
    plan = _whole_plan(layout)
    if plan is None:
        return
    name = study_name(storage, f"{layout.study}-{plan['space']}", checkout_id(layout.root))
    for study in storage.get_all_studies():
        if study.study_name != name:
            continue
        beating = _beating(storage) - set(storage._get_stale_trial_ids(study._study_id))
        for frozen in storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            machine = str(frozen.user_attrs.get(WORKER, "")).partition(":")[0]
            if machine not in {"", host()} and frozen._trial_id in beating:
                continue  # Its worker lives, on another machine.
            trial = str(frozen.user_attrs.get(HASH))
            if fix:
                _free(storage, frozen)
            end = "has its result" if trial in done else "has no worker"
            yield Disagreement(
                layout.study,
                f"Optuna trial {frozen.number} ({trial}) is RUNNING but {end}",
                "free it for the next run",
                fix,
            )


def _beating(storage: RDBStorage) -> set[int]:
    """Return the Optuna trials whose worker has ever given a heartbeat."""
    with storage.engine.connect() as connection:
        return {int(row[0]) for row in connection.execute(text("SELECT trial_id FROM trial_heartbeats"))}


def _free(storage: RDBStorage, frozen: FrozenTrial) -> None:
    """Its result, or a new attempt, comes with the next run of the study, which compares plan, queue and results."""
    try:
        storage.set_trial_user_attr(frozen._trial_id, ERROR, "freed by ablate doctor")
        storage.set_trial_state_values(frozen._trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return  # Its worker lives on another machine and has just finished it.


class _Runs:
    """MLflow's runs of one study against its results."""

    def __init__(self, layout: Layout, client: MlflowClient, uri: str, fix: bool) -> None:
        self.layout, self.client, self.uri, self.fix = layout, client, uri, fix

    def check(self) -> Iterator[Disagreement]:
        """Unsent events, runs stuck RUNNING, trials without runs, runs without trials."""
        found = self.client.get_experiment_by_name(self.layout.study)
        if found is None or found.lifecycle_stage != "active":
            return
        yield from self._spools()
        runs = list(
            runs_of(self.client, self.layout, found.experiment_id, own=self.uri == default_uri(self.layout.root))
        )
        children = [r for r in runs if r.data.tags.get(tags.ROLE) == "trial"]
        done = self.layout.done()
        for run in runs:
            name = run.data.tags.get(tags.TRIAL)
            if run.info.status == "RUNNING":
                yield self._stuck(run, name, done)
            elif run in children and run.info.status == "FINISHED" and name not in done:
                if self.fix:
                    self.client.set_tag(run.info.run_id, tags.STATUS, "orphaned")
                if self.fix or run.data.tags.get(tags.STATUS) != "orphaned":
                    yield self._finding(f"run {run.info.run_id} has no result ({name})", "tag it as orphaned")
        parents = [r for r in runs if r.data.tags.get(tags.ROLE) == "study"]
        tracked = {str(r.data.tags.get(tags.TRIAL)) for r in children}
        by_space = {str(p.data.tags.get(tags.SPACE)): str(p.info.run_id) for p in reversed(parents)}
        for name in sorted(done - tracked) if parents else []:
            try:
                record = load_record(self.layout.record(name))
            except ConfigError:
                continue  # `_files` names it.
            if self.fix:
                parent = by_space.get(record.space, str(parents[0].info.run_id))
                tracker = MlflowTracker(self.uri)
                tracker.experiment, tracker.parent = found.experiment_id, parent
                tracker.checkout = checkout_id(self.layout.root)
                tracker.write(record, self.layout, self.client)
            yield self._finding(f"trial {name} has no run", "write one from its result")

    def _spools(self) -> Iterator[Disagreement]:
        for path in sorted(spool_path(self.layout, "any").parent.glob("*.jsonl")):
            spool = Spool(path)
            if self.layout.record(path.stem).exists():
                if self.fix:
                    tracker = MlflowTracker(self.uri)
                    tracker.settle(self.layout, self.client)
                yield self._finding(f"unsent events of trial {path.stem}", "send them")
            elif not spool.events:
                if self.fix:
                    path.unlink(missing_ok=True)  # unless sending the others has done it
                yield self._finding(f"empty spool {path.name}", "delete it")

    def _stuck(self, run: Run, name: str | None, done: set[str]) -> Disagreement:
        if name in done:
            status, why = "FINISHED", "its trial has a result"
        elif run.data.tags.get(tags.ROLE) == "study" and self._complete(run, done):
            status, why = "FINISHED", "all its trials have results"
        else:
            status, why = "KILLED", "no process works on it"
        # Sending what was unsent may have closed it since it was listed.
        if self.fix and self.client.get_run(run.info.run_id).info.status == "RUNNING":
            self.client.set_terminated(run.info.run_id, status=status)
            self.client.set_tag(run.info.run_id, tags.STATUS, status.lower())
        return self._finding(f"run {run.info.run_id} is RUNNING but {why}", f"set it to {status}")

    def _complete(self, run: Run, done: set[str]) -> bool:
        plan = _whole_plan(self.layout)
        if plan is None or plan["space"] != run.data.tags.get(tags.SPACE) or plan["design"] == "search":
            return False
        return not plan["waiting_for_tune"] and {t["trial"] for t in plan["trials"]} <= done

    def _finding(self, problem: str, remedy: str) -> Disagreement:
        return Disagreement(self.layout.study, problem, remedy, self.fix)


def _pipeline(root: Path) -> Iterator[Disagreement]:
    """Outputs that dvc.lock promises and the disk does not have."""
    lock = root / "dvc.lock"
    if not lock.exists():
        return
    try:
        stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages") or {}
        outs = [(stage, out["path"]) for stage, entry in sorted(stages.items()) for out in entry.get("outs", [])]
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, KeyError, RecursionError):
        yield Disagreement(
            "", "dvc.lock is not one of DVC's", "restore it with git, or delete it and run `dvc repro`", False
        )
        return
    for stage, path in outs:
        # Metrics alone are in DVC's cache: an experiment on other studies takes them from the workspace.
        if not (root / path).exists() and Path(path).name != "metrics.json":
            study = stage.partition("@")[2]
            yield Disagreement(study, f"{path}, made by stage {stage}, is gone", "run `dvc repro`", False)
