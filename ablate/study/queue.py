"""The Optuna study behind a study: planned trials wait in it, workers claim them, searches sample from it.

A trial's result file is the truth; the queue only decides who runs what next, and can be rebuilt from plan and results.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from ablate.config import ConfigError, Factor, Scalar, Study
from ablate.study.designs import Plan, PlannedTrial, exists, ordered_factors
from ablate.study.records import Record

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 90
MAX_RETRIES = 2
DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {
    "bpb": "minimize",
    "n_eff_frac": "maximize",
    "dead_frac": "minimize",
    "bits_lost": "minimize",
}
HASH, ARM, SEED, KIND, WORKER, ERROR = "trial", "arm", "seed", "kind", "worker", "error"

optuna.logging.set_verbosity(optuna.logging.WARNING)


def default_storage(root: Path) -> str:
    """The SQLite database under the project's state folder, as an absolute URL."""
    return f"sqlite:///{(root / 'state' / 'optuna.db').resolve()}"


def open_storage(url: str) -> RDBStorage:
    """Connect; SQLite gets a write-ahead log and a long busy timeout.

    Raises:
        ConfigError: the URL is not one, its driver is missing, or no database answers.
    """
    try:
        backend = make_url(url).get_backend_name()
    except ArgumentError:
        raise ConfigError(
            f"storage is {url!r}: a database URL is expected, sqlite:////path or postgresql://…"
        ) from None
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if backend == "sqlite":
        arguments = {"connect_args": {"timeout": 60}}
        file = make_url(url).database
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = RDBStorage(
                url,
                engine_kwargs=arguments,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
            )
    except (OperationalError, ImportError, StorageInternalError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"storage {make_url(url).render_as_string()!r} cannot be used: {reason}") from None
    if backend == "sqlite":
        tune_sqlite(storage.engine)
    return storage


def tune_sqlite(engine: sqlalchemy.Engine) -> None:
    """Make SQLite safe for several workers.

    Each transaction takes the write lock at its start: SQLite knows no SELECT FOR UPDATE, so that otherwise two workers
    can both read WAITING and both claim the trial (seen with 2 workers and Optuna 5.0). The write-ahead log with NORMAL
    survives any killed process and spares an fsync a commit.
    """

    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None  # Or the driver would begin transactions of its own, later.
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    def begun(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", connected)
    sqlalchemy.event.listen(engine, "begin", begun)
    engine.dispose()


@dataclass(slots=True)
class Claim:
    """A trial that this process, and no other, may run now."""

    trial: optuna.Trial
    hash: str | None
    """Hash of the planned trial; None for a candidate of a search."""
    seed: int | None
    """Seed that the trial had before it was interrupted; None where it is new."""


class Queue:
    """One study's trials in the storage."""

    def __init__(self, plan: Plan, storage: RDBStorage, seed: int = 0) -> None:
        self.plan, self.storage = plan, storage
        study = plan.study
        self.study = optuna.create_study(
            study_name=plan.storage_name,
            storage=storage,
            directions=[DIRECTIONS[name] for name in study.objectives],
            sampler=_sampler(study, seed),
            pruner=_pruner(study),
            load_if_exists=True,
        )
        self._candidates: list[int] = []

    def reconcile(self, done: set[str], load: Callable[[str], Record], host: str) -> int:
        """Bring the queue in line with the plan and the results; called by the one parent process, before its workers.

        Trials that no living worker runs are freed, finished ones closed, missing ones put in; `load` reads the record
        of a done trial. Returns how many trials wait (for a search bounded by tokens or hours: at least 0).

        Raises:
            ConfigError: a worker of another machine is running this study now.
        """
        planned = {t.hash: t for t in self.plan.trials}
        waiting: set[str] = set()
        slots = 0
        search = self.plan.study.design == "search"
        self.rescue_stale()
        trials = self.study.get_trials(deepcopy=False)
        for frozen in trials:
            name = frozen.user_attrs.get(HASH)
            if frozen.state == TrialState.RUNNING:
                self._refuse_if_alive(frozen, host)
                if name in done:
                    self._close(frozen._trial_id, load(name))
                elif self._fail(frozen._trial_id, "its process died", retry=search, fresh=True):
                    slots += 1
            elif frozen.state == TrialState.WAITING:
                if search:
                    slots += 1
                elif name in done:
                    self._close(frozen._trial_id, load(name))
                elif name not in planned or name in waiting:
                    self._fail(frozen._trial_id, "no longer in the plan")
                else:
                    waiting.add(name)
        if search:
            self._remember(done - {t.user_attrs.get(HASH) for t in trials}, load)
            return self._fill_search(slots)
        for name, trial in planned.items():
            if name not in done and name not in waiting:
                self._enqueue(trial)
                waiting.add(name)
        return len(waiting)

    def claim(self, worker: str) -> Claim | None:
        """Take a waiting trial, exactly one process each; None where none waits.

        A search whose budget counts tokens or hours has no fixed number of trials: there a new one is made.
        """
        while True:
            if not self._candidates:
                frozen = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
                self._candidates = [t._trial_id for t in reversed(frozen)]
                if not self._candidates:
                    return self._open_ended(worker)
            number = self._candidates.pop()
            try:
                mine = self.storage.set_trial_state_values(number, state=TrialState.RUNNING)
            except UpdateFinishedTrialError:
                continue
            if mine:
                return self._claimed(optuna.Trial(self.study, number), worker)

    def suggest(self, claim: Claim) -> dict[str, Scalar]:
        """Sample a search candidate's levels; conditional factors only where they exist."""
        chosen: dict[str, Scalar] = {}
        for key, factor in ordered_factors(self.plan.study):
            if exists(factor, chosen):
                chosen[key] = _suggest(claim.trial, key, factor)
        return chosen

    def note(self, claim: Claim, planned: PlannedTrial) -> None:
        """Write a candidate's identity onto its queue entry."""
        claim.hash = planned.hash
        claim.trial.set_user_attr(HASH, planned.hash)
        claim.trial.set_user_attr(SEED, planned.seed)

    def finish(self, claim: Claim, record: Record) -> None:
        """Close a claimed trial with its result."""
        self._close(claim.trial._trial_id, record)

    def fail(self, claim: Claim, message: str, *, retry: bool, fresh: bool = False) -> bool:
        """Give a claimed trial up; with `retry` it waits again, at most twice unless `fresh`. Returns whether so."""
        return self._fail(claim.trial._trial_id, message, retry=retry, fresh=fresh)

    def replace(self, claim: Claim, message: str) -> None:
        """A search candidate that cannot be: it costs no budget, another one is sampled in its place."""
        self._fail(claim.trial._trial_id, f"impossible: {message}")
        if self.plan.study.budget.trials is not None:
            self.study.enqueue_trial({})

    def waiting(self) -> int:
        """Trials that nobody has claimed yet."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def rescue(self, worker: str) -> list[tuple[str, bool]]:
        """Free the trials of a worker that is known to be dead; returns each hash and whether it waits again."""
        freed = []
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.user_attrs.get(WORKER) == worker:
                again = self._fail(frozen._trial_id, f"worker {worker} died", retry=True)
                freed.append((str(frozen.user_attrs.get(HASH)), again))
        return freed

    def rescue_stale(self) -> None:
        """Free trials whose worker, on whatever machine, has not given a heartbeat for the grace period."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)

    def running(self) -> int:
        """Trials that some worker runs now."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    @contextmanager
    def heartbeat(self, claim: Claim) -> Iterator[None]:
        """Tell the storage every 15 s that this trial is being worked on."""
        stop = threading.Event()
        number = claim.trial._trial_id

        def beat() -> None:
            while True:
                # A storage that is away for a while must not end the trial; the grace period bridges it.
                with suppress(StorageInternalError):
                    self.storage.record_heartbeat(number)
                if stop.wait(HEARTBEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _claimed(self, trial: optuna.Trial, worker: str) -> Claim:
        trial.set_user_attr(WORKER, worker)
        attributes = trial.user_attrs
        return Claim(trial=trial, hash=attributes.get(HASH), seed=attributes.get(SEED))

    def _open_ended(self, worker: str) -> Claim | None:
        budget = self.plan.study.budget
        if self.plan.study.design != "search" or budget.trials is not None:
            return None
        return self._claimed(self.study.ask(), worker)

    def _fill_search(self, slots: int) -> int:
        """Put in the search's remaining trials without parameters: they are sampled when they are claimed."""
        budget = self.plan.study.budget.trials
        if budget is None:
            return slots
        spent = sum(t.state.is_finished() and ERROR not in t.user_attrs for t in self.study.get_trials(deepcopy=False))
        for _ in range(budget - spent - slots):
            self.study.enqueue_trial({})
        return max(slots, budget - spent)

    def _remember(self, forgotten: set[str], load: Callable[[str], Record]) -> None:
        """Teach a new database the search's earlier results."""
        for name in sorted(forgotten):
            record = load(name)
            values = objective_values(self.plan.study, record)
            if record.space != self.plan.space or values is None or record.status == "pruned":
                continue
            params: dict[str, Scalar] = {}
            for key, factor in ordered_factors(self.plan.study):
                if exists(factor, params):
                    params[key] = record.factors[key]
            distributions = {key: _distribution(self.plan.study.factors[key]) for key in params}
            self.study.add_trial(
                optuna.trial.create_trial(
                    values=values,
                    params=params,
                    distributions=distributions,
                    user_attrs={HASH: name, SEED: record.seed},
                )
            )

    def _enqueue(self, planned: PlannedTrial) -> None:
        attributes = {HASH: planned.hash, ARM: planned.arm, SEED: planned.seed, KIND: planned.kind}
        self.study.enqueue_trial({}, user_attrs=attributes)

    def _refuse_if_alive(self, frozen: FrozenTrial, host: str) -> None:
        worker = str(frozen.user_attrs.get(WORKER, ""))
        if not worker or worker.partition(":")[0] == host:
            return
        raise ConfigError(
            f"study {self.plan.study.name!r} is running on {worker.partition(':')[0]!r}; stop it there, or if it died "
            f"wait {GRACE_SECONDS} s until its trial counts as lost"
        )

    def _fail(self, number: int, message: str, *, retry: bool = False, fresh: bool = False) -> bool:
        """Mark a trial failed and, with `retry`, put a copy in line that keeps its parameters and identity."""
        self.storage.set_trial_user_attr(number, ERROR, message)
        try:
            self.storage.set_trial_state_values(number, state=TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False
        if not retry:
            return False
        frozen = self.storage.get_trial(number)
        attributes = {k: v for k, v in frozen.user_attrs.items() if k not in (ERROR, WORKER)}
        history = [] if fresh else [*frozen.system_attrs.get("retry_history", []), frozen.number]
        if len(history) > MAX_RETRIES:
            return False
        system = {
            "fixed_params": frozen.params,
            "failed_trial": (history or [frozen.number])[0],
            "retry_history": history,
        }
        self.study.add_trial(
            optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=attributes, system_attrs=system)
        )
        return True

    def _close(self, number: int, record: Record) -> None:
        values = objective_values(self.plan.study, record)
        state = TrialState.COMPLETE
        if values is None:
            # A single-objective sampler learns from a pruned trial; with several, Optuna knows no such state.
            state = TrialState.PRUNED if len(self.plan.study.objectives) == 1 else TrialState.FAIL
        elif record.status == "pruned":
            state, values = TrialState.PRUNED, None
        try:
            self.storage.set_trial_state_values(number, state=state, values=values)
        except UpdateFinishedTrialError:
            return  # Another process closed it with the same result.


def objective_values(study: Study, record: Record) -> list[float] | None:
    """The study's objectives at the end of a trial; None where the trial diverged."""
    final = record.final
    values = [final.bpb if name == "bpb" else final.balance.get(name) for name in study.objectives]
    known = [v for v in values if v is not None]
    return known if len(known) == len(values) and record.status != "diverged" else None


def _suggest(trial: optuna.Trial, key: str, factor: Factor) -> Scalar:
    if factor.levels is not None:
        return trial.suggest_categorical(key, factor.levels)
    bounds = factor.range
    assert bounds is not None
    if bounds.integer:
        return trial.suggest_int(key, int(bounds.low), int(bounds.high), log=bounds.log)
    return trial.suggest_float(key, bounds.low, bounds.high, log=bounds.log)


def _distribution(factor: Factor) -> BaseDistribution:
    if factor.levels is not None:
        return CategoricalDistribution(factor.levels)
    assert factor.range is not None
    if factor.range.integer:
        return IntDistribution(int(factor.range.low), int(factor.range.high), log=factor.range.log)
    return FloatDistribution(factor.range.low, factor.range.high, log=factor.range.log)


def _sampler(study: Study, seed: int) -> optuna.samplers.BaseSampler:
    if study.design == "search":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)  # Never asked: every trial is enqueued.


def _pruner(study: Study) -> optuna.pruners.BasePruner:
    if study.pruner == "halving":
        # The resource is tokens in units of one evaluation, so that trials of unlike batch sizes are compared fairly.
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if study.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    return optuna.pruners.NopPruner()
