"""`ablate doctor`: do results, Optuna's trials, MLflow's runs, checkpoints and DVC agree, and if not, make them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from ablate.config import ConfigError
from ablate.files import leftovers
from ablate.results import layout as files
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.results.record import Record, load_record
from ablate.study.address import default_storage
from ablate.study.queue import ERROR, HASH
from ablate.study.status import is_live
from ablate.study.storage import open_storage
from ablate.tracking import tags
from ablate.tracking.sender import Sender
from ablate.tracking.spool import Spool, spool_path
from ablate.tracking.store import default_uri, prepare_store, sqlite_file
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
    optuna = _existing_storage(storage or default_storage(root))
    client = _existing_store(tracking or default_uri(root))
    findings: list[Disagreement] = []
    for name in sorted(names):
        layout = Layout(root, name)
        if is_live(layout):
            continue
        checks = [_files(layout, fix), _checkpoints(layout, fix)]
        if optuna:
            checks.append(_trials(layout, optuna, fix))
        if client:
            checks.append(_Runs(layout, client, tracking or default_uri(root), fix).check())
        findings += [finding for check in checks for finding in check]
    findings += _pipeline(root)
    return findings


def _existing_storage(url: str) -> RDBStorage | None:
    if url.startswith("sqlite") and not Path(make_url(url).database or "").exists():
        return None
    return open_storage(url)


def _existing_store(uri: str) -> MlflowClient | None:
    file = sqlite_file(uri)
    return None if file is not None and not file.exists() else prepare_store(uri)


def _files(layout: Layout, fix: bool) -> Iterator[Disagreement]:
    """Half-written and damaged files among the results."""
    for path in leftovers(layout.results):
        if fix:
            path.unlink(missing_ok=True)
        yield Disagreement(layout.study, f"half-written file {path.name}", "delete it", fix)
    done, prunes = layout.done(), layout.prunes()
    for name in sorted(done):
        try:
            load_record(layout.record(name))
        except ConfigError:
            if fix:
                aside = layout.state / "damaged" / layout.study
                aside.mkdir(parents=True, exist_ok=True)
                for path in (*layout.tables_of(name), *prunes.get(name, []), layout.record(name)):
                    path.replace(aside / path.name)
            yield Disagreement(
                layout.study, f"damaged result {name}.json", "move it to state/damaged; it is run again", fix
            )
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
    plan = load_plan(layout)
    for study in storage.get_all_studies():
        if plan is None or study.study_name != f"{layout.study}-{plan['space']}":
            continue
        for frozen in storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            name = str(frozen.user_attrs.get(HASH))
            if fix:
                _free(storage, frozen)
            end = "has its result" if name in done else "has no worker"
            yield Disagreement(
                layout.study,
                f"Optuna trial {frozen.number} ({name}) is RUNNING but {end}",
                "free it for the next run",
                fix,
            )


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
        runs = list(self._all(found.experiment_id))
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
        tracked = {r.data.tags.get(tags.TRIAL) for r in children}
        for name in sorted(done - tracked) if parents else []:
            record = load_record(self.layout.record(name))
            parent = next((p for p in parents if p.data.tags.get(tags.SPACE) == record.space), parents[0])
            if self.fix:
                self._write(record, found.experiment_id, parent.info.run_id)
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
                    path.unlink()
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
        plan = load_plan(self.layout)
        if plan is None or plan["space"] != run.data.tags.get(tags.SPACE) or plan["design"] == "search":
            return False
        return not plan["waiting_for_tune"] and {t["trial"] for t in plan["trials"]} <= done

    def _write(self, record: Record, experiment: str, parent: str) -> None:
        tracker = MlflowTracker(self.uri)
        tracker.experiment, tracker.parent = experiment, parent
        spool = Spool(spool_path(self.layout, record.trial))
        for event in tracker.whole(record, self.layout, self.layout.tables_of(record.trial)):
            spool.append(event)
        try:
            Sender(self.client, spool).send()
        except MlflowException as error:
            raise ConfigError(f"tracking is {self.uri!r}: it went away ({str(error).splitlines()[0]})") from None
        spool.remove()

    def _all(self, experiment: str) -> Iterator[Run]:
        token: Any = None
        while True:
            page = self.client.search_runs([experiment], "", ViewType.ACTIVE_ONLY, 1000, None, token)
            yield from page
            token = page.token
            if not token:
                return

    def _finding(self, problem: str, remedy: str) -> Disagreement:
        return Disagreement(self.layout.study, problem, remedy, self.fix)


def _pipeline(root: Path) -> Iterator[Disagreement]:
    """Outputs that dvc.lock promises and the disk does not have."""
    lock = root / "dvc.lock"
    if not lock.exists():
        return
    try:
        stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    except (yaml.YAMLError, UnicodeDecodeError):
        yield Disagreement("", "dvc.lock is not YAML", "restore it with git, or delete it and run `dvc repro`", False)
        return
    for stage, entry in sorted(stages.items()):
        for out in entry.get("outs", []):
            # Metrics alone are in DVC's cache: an experiment on other studies takes them from the workspace.
            if not (root / out["path"]).exists() and Path(out["path"]).name != "metrics.json":
                study = stage.partition("@")[2]
                yield Disagreement(study, f"{out['path']}, made by stage {stage}, is gone", "run `dvc repro`", False)
