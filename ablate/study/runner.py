"""`run_study`: plan, queue, workers, and going on after anything that can happen to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ablate.config import ConfigError, Study, masked
from ablate.files import leftovers
from ablate.model.memory import check_memory
from ablate.results.intact import problems, set_aside
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.results.record import read_record
from ablate.study.address import default_storage
from ablate.study.designs import Plan, expand, one_of_each
from ablate.study.engines import LocalEngine
from ablate.study.job import Job, Run
from ablate.study.kernels import compile_kernels
from ablate.study.outcome import Outcome
from ablate.study.phases import plan_of, queue_of
from ablate.study.progress import Display
from ablate.study.session import Engine, Session
from ablate.study.stopping import Stopped, stopping
from ablate.study.storage import open_or_rebuild
from ablate.study.tracker import Tracker


def run_study(
    study: Study,
    root: Path,
    *,
    workers: int = 1,
    data_root: Path | None = None,
    storage: str | None = None,
    tracker: Tracker | None = None,
    engine: Engine | None = None,
    run: Run | None = None,
    display: Display | None = None,
) -> Outcome:
    """Run every trial of a study that has no result yet; safe to call again after any crash.

    Args:
        study: the study file.
        root: the project's root; results/, state/ and tables/ lie under it.
        workers: local processes; threads are divided among them.
        data_root: prepared corpora; root/data where not given.
        storage: Optuna's database URL; SQLite under root/state where not given.
        tracker: where runs are tracked (tracking.tracker.MlflowTracker); None tracks nothing.
        engine: where workers run; local processes where not given.
        run: what runs a trial; training.trial.run_trial where not given. It is pickled into workers.
        display: shows progress.

    Raises:
        ConfigError: before anything is trained: an invalid arm, a changed confirm plan, an unusable corpus, storage or
            tracking server, or a study that is running already.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}: at least 1 is needed")
    root = root.resolve()
    layout = Layout(root, study.name)
    engine = engine or LocalEngine(workers)
    plan = expand(study)
    if run is None and isinstance(engine, LocalEngine):
        check_memory(one_of_each(plan), engine.workers)
    display = display or Display(study, engine.workers)
    with _alone(layout), stopping() as stops, display:
        try:
            job, card = _prepared(plan, layout, engine, display, data_root or root / "data", storage, tracker, run)
            queue = queue_of(job)
            queue.describe()
            display.say(f"Optuna: {masked(job.storage)}, study {queue.study.study_name}")
            display.say(
                f"  optuna-dashboard {masked(job.storage)!r}   shows it while it runs (pip install optuna-dashboard)"
            )
            if tracker:
                with display.busy("opening MLflow ..."):
                    tracker.start_study(job.plan, layout, card)
            if run is None and isinstance(engine, LocalEngine):
                finished = layout.done()
                waiting = [t.trial for t in job.plan.trials if t.hash not in finished]
                waiting += [study.trial({})] if job.plan.racing else []
                compile_kernels(waiting, root, display.say, lambda: stops.received is not None)
        except Stopped as stop:
            return Outcome(len(layout.done()), plan.total or len(layout.done()), signal=stop.number)
        with stops.noting():
            session = Session(job, engine, queue, stops, display)
            session.run()
            done = session.done()
            total = session.job.plan.total or done
            outcome = Outcome(done, total, session.failed, stops.received, session.message)
            if tracker:
                status = "killed" if outcome.signal else "failed" if outcome.exit_code else "finished"
                tracker.end_study(job.plan, layout, status)
        return outcome


def _prepared(
    plan: Plan,
    layout: Layout,
    engine: Engine,
    display: Display,
    data_root: Path,
    storage: str | None,
    tracker: Tracker | None,
    run: Run | None,
) -> tuple[Job, dict[str, Any] | None]:
    """Make ready what workers need, what may be refused first; returns their job and the corpus's data card."""
    for partial in leftovers(layout.results):
        partial.unlink(missing_ok=True)
    storage = storage or default_storage(layout.root)
    study = plan.study
    first = study.trial({})
    if run is None and first.task.kind == "language":
        from ablate.data.tokens import corpus_key

        corpus_key(first.corpus, data_root)  # a source that is missing is said before anything takes long
    with display.busy("opening the stores ..."):
        open_or_rebuild(storage, layout.root, display.say)
        if tracker:
            tracker.check(layout, display.say)
    _repair(layout, display.say)
    card = None
    if run is None:
        with display.busy("preparing the corpus ..."):
            card = _data_card(study, data_root)
        _set_aside(layout, card)
    job = Job(
        plan=plan_of(plan, layout),
        root=layout.root,
        data_root=data_root.resolve(),
        storage=storage,
        tracker=tracker,
        run=run,
        threads=engine.threads,
    )
    return job, card


def _repair(layout: Layout, say: Callable[[str], None]) -> None:
    """Set aside what is damaged among the results, so that it is trained again."""
    for name, problem in problems(layout, sorted(layout.done())).items():
        aside = set_aside(layout, name)
        say(f"{problem}: moved to {aside}; trial {name} is trained again")


def _data_card(study: Study, data_root: Path) -> dict[str, Any]:
    """Prepare the task's data once, before any worker needs them; raises ConfigError for what cannot be used."""
    from ablate.tasks.registry import data_card

    return data_card(study.trial({}), data_root)


def _set_aside(layout: Layout, card: dict[str, Any]) -> None:
    """Move results that were measured on other data out of the way: they cannot be compared with new ones."""
    plan = load_plan(layout)
    for name in sorted(layout.done()) if plan else []:
        origin = read_record(layout.record(name))["provenance"]
        made = (origin["data_hash"], origin["tokenizer_hash"])
        if made != (card["data_hash"], card["tokenizer_hash"]):
            old = layout.state / "superseded" / layout.study / made[0]
            old.mkdir(parents=True, exist_ok=True)
            for path in (*layout.tables_of(name), layout.record(name)):
                path.replace(old / path.name)


@contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Hold the study's lock; raises ConfigError where another process on this machine runs it."""
    folder = layout.state / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / f"{layout.study}.lock"), folder / f"{layout.study}.pid"
    try:
        lock.acquire(blocking=False)
    except Timeout:
        pid = owner.read_text().strip() if owner.exists() else "?"
        raise ConfigError(
            f"study {layout.study!r} is running already, as process {pid}; wait for it or stop it"
        ) from None
    try:
        owner.write_text(f"{os.getpid()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
