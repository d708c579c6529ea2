"""The Optuna study behind a study: planned trials wait in it, and workers claim them.

A trial's result file is the truth; the queue only decides who runs what next, and can be rebuilt from plan and results.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from ablate.config import ConfigError, Study
from ablate.config.endpoints import Direction
from ablate.config.tune import HIGHEST
from ablate.results.index import Finished
from ablate.results.record import Record
from ablate.study.checkout import OWNER, study_name
from ablate.study.designs import Plan, PlannedTrial
from ablate.study.storage import GRACE_SECONDS, HEARTBEAT_SECONDS, MAX_RETRIES

RATE, LOWEST = "train.lr", 1e-12
AHEAD = 256
"""Trials that wait in line for the workers at most, beside those that a former run of the study put in."""
FILL_SECONDS = 0.5
"""How long the parent puts trials in before it looks at its workers."""
HASH, ARM, SEED, KIND, WORKER, ERROR, RUN = "trial", "arm", "seed", "kind", "worker", "error", "mlflow_run"


@dataclass(slots=True)
class Claim:
    """A trial of the storage that this process, and no other, may run now."""

    trial: optuna.Trial
    hash: str | None = None
    """Hash of the planned trial; None for a candidate of a search, which has one a seed."""

    @property
    def id(self) -> int:
        """Optuna's key of the trial."""
        return self.trial._trial_id


class Queue:
    """One study's planned trials in the storage."""

    def __init__(self, plan: Plan, storage: RDBStorage, checkout: str | None = None) -> None:
        self.plan, self.storage, self.checkout = plan, storage, checkout
        self.study = optuna.create_study(
            study_name=study_name(storage, plan.storage_name, checkout) if checkout else plan.storage_name,
            storage=storage,
            directions=directions(plan.study),
            sampler=optuna.samplers.RandomSampler(seed=0),  # Never asked: levels are set when a trial is put in.
            pruner=_pruner(plan.study),
            load_if_exists=True,
        )
        self._waiting: list[int] = []
        self._missing: list[PlannedTrial] = []
        self._put = 0

    def describe(self) -> None:
        """Write what a reader of Optuna's own tools wants to know onto the study; called by the one parent process."""
        study = self.plan.study
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.set_metric_names(list(study.objectives))
        about = {
            "title": study.title,
            "design": study.design,
            "plan": self.plan.hash,
            "space": self.plan.space,
            "match": study.match,
            "base": study.trial({}).model_dump(mode="json", include={"model", "tree", "train"}),
            "command": f"ablate study run studies/{study.name}.yaml",
            "report": f"out/{study.name}/index.html",
        }
        if self.checkout:
            about[OWNER] = self.checkout
        known = self.study.user_attrs
        for key, value in about.items():
            if known.get(key) != value:
                self.study.set_user_attr(key, value)

    def reconcile(self, done: set[str], load: Callable[[str], Record], host: str) -> int:
        """Bring the queue in line with the plan and the results; called by the one parent process, before its workers.

        Trials that no living worker runs are freed, finished ones closed, missing ones put in; `load` reads the record
        of a done trial. Returns how many trials wait.

        Raises:
            ConfigError: a worker of another machine is running this study now.
        """
        planned = {t.hash: t for t in self.plan.trials}
        waiting: set[str] = set()
        self.rescue_stale()
        for frozen in self._in((TrialState.RUNNING, TrialState.WAITING)):
            name = frozen.user_attrs.get(HASH)
            if frozen.state == TrialState.RUNNING:
                self._refuse_if_alive(frozen, host)
                if name in done:
                    self._close(frozen._trial_id, load(name))
                else:
                    self._fail(frozen._trial_id, "its process died")
            elif frozen.state == TrialState.WAITING:
                if name in done:
                    self._close(frozen._trial_id, load(name))
                elif name not in planned or name in waiting:
                    self._fail(frozen._trial_id, "no longer in the plan")
                else:
                    waiting.add(name)
        self._missing = [t for name, t in reversed(planned.items()) if name not in done and name not in waiting]
        self._put = len(waiting)
        if self.plan.study.tune is None:
            self.fill(0)
        while self.plan.study.tune and self._missing:
            # Workers add what results ask for to what is in line, so that all of it has to be there.
            self._enqueue(self._missing.pop())
        return self.demand()

    def fill(self, started: int) -> None:
        """Put in trials of the plan that are in nobody's line yet, for a moment; called by the parent while workers run.

        Ten thousand trials take minutes to put in, so that workers start when the first are there.

        Args:
            started: trials that workers have begun since `reconcile`; not many more than that are put in ahead of them.
        """
        end = time.monotonic() + FILL_SECONDS
        while self._missing and self._put < started + AHEAD and time.monotonic() < end:
            self._enqueue(self._missing.pop())
            self._put += 1

    def add(self, plan: Plan) -> int:
        """Put in line the trials of a grown plan that the storage has never seen; returns how many they are."""
        known = {frozen.user_attrs.get(HASH) for frozen in self.study.get_trials(deepcopy=False)}
        missing = [trial for trial in plan.trials if trial.hash not in known]
        for trial in missing:
            self._enqueue(trial)
        return len(missing)

    def claim(self, worker: str) -> Claim | None:
        """Take a waiting trial, exactly one process each; None where none waits."""
        while True:
            if not self._waiting:
                self._waiting = [t._trial_id for t in reversed(self.open_trials())]
                if not self._waiting:
                    return None
            number = self._waiting.pop()
            try:
                mine = self.storage.set_trial_state_values(number, state=TrialState.RUNNING)
            except UpdateFinishedTrialError:
                continue
            if mine:
                return self._claimed(number, worker)

    def finish(self, claim: Claim, record: Record) -> None:
        """Close a claimed trial with its result."""
        if record.run_id:
            with suppress(UpdateFinishedTrialError):
                claim.trial.set_user_attr(RUN, record.run_id)
        self._close(claim.id, record)

    def fail(self, claim: Claim, message: str, *, retry: bool, fresh: bool = False) -> bool:
        """Give a claimed trial up; with `retry` it waits again, at most twice unless `fresh`. Returns whether so."""
        return self._fail(claim.id, message, retry=retry, fresh=fresh)

    def demand(self) -> int:
        """Return how many more workers could start a trial now."""
        return len(self.open_trials()) + len(self._missing)

    def open_trials(self) -> list[FrozenTrial]:
        """Return the trials that a worker may claim."""
        return self._in((TrialState.WAITING,))

    def known(self, finished: Iterable[Finished]) -> dict[str, dict[int, tuple[float, ...]]]:
        """Return the objectives' values of finished trials of the plan, by arm and seed."""
        planned = {t.hash for t in self.plan.trials}
        found: dict[str, dict[int, tuple[float, ...]]] = {}
        for one in finished:
            values = [one.values.get(name) for name in self.plan.study.objectives]
            known = tuple(value for value in values if value is not None)
            if one.trial in planned and one.status == "finished" and len(known) == len(values):
                found.setdefault(one.arm, {})[one.seed] = known
        return found

    def rescue(self, worker: str, *, fresh: bool = False) -> list[tuple[str, bool]]:
        """Free the trials of a worker that is known to be dead; returns each name and whether it waits again.

        With `fresh`, the worker was ended on purpose, which is no fault of its trial's.
        """
        freed = []
        for frozen in self._in((TrialState.RUNNING,)):
            if frozen.user_attrs.get(WORKER) == worker:
                again = self._fail(frozen._trial_id, f"worker {worker} died", retry=True, fresh=fresh)
                freed.append((str(frozen.user_attrs.get(HASH) or frozen.user_attrs.get(ARM)), again))
        return freed

    def rescue_stale(self) -> None:
        """Free trials whose worker, on whatever machine, has not given a heartbeat for the grace period."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)

    def running(self) -> int:
        """Return how many trials some worker runs now."""
        return len(self._in((TrialState.RUNNING,)))

    @contextmanager
    def heartbeat(self, claim: Claim) -> Iterator[None]:
        """Tell the storage every 15 s that this trial is being worked on."""
        stop = threading.Event()

        def beat() -> None:
            while True:
                # A storage that is away for a while must not end the trial; the grace period bridges it.
                with suppress(StorageInternalError):
                    self.storage.record_heartbeat(claim.id)
                if stop.wait(HEARTBEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _in(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """Return the trials in some states, straight from the storage: Optuna's study would load all, for seconds."""
        return self.storage.get_all_trials(self.study._study_id, deepcopy=False, states=states)

    def _claimed(self, number: int, worker: str) -> Claim:
        trial = optuna.Trial(self.study, number)
        trial.set_user_attr(WORKER, worker)
        return Claim(trial=trial, hash=trial.user_attrs.get(HASH))

    def _enqueue(self, planned: PlannedTrial) -> None:
        attributes = {HASH: planned.hash, ARM: planned.arm, SEED: planned.seed, KIND: planned.kind}
        if planned.kind != "tune":
            self.study.enqueue_trial({}, user_attrs=attributes)
            return
        # A point of its own choice; one range for all points, for a range that grows is another parameter to Optuna.
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params={RATE: planned.trial.train.lr},
                distributions={RATE: FloatDistribution(LOWEST, HIGHEST, log=True)},
                user_attrs=attributes,
            )
        )

    def _refuse_if_alive(self, frozen: FrozenTrial, host: str) -> None:
        worker = str(frozen.user_attrs.get(WORKER, ""))
        if not worker or worker.partition(":")[0] == host:
            return
        raise ConfigError(
            f"study {self.plan.study.name!r} is running on {worker.partition(':')[0]!r}; stop it there, or if it died "
            f"wait {GRACE_SECONDS} s until its trial counts as lost"
        )

    def _fail(self, number: int, message: str, *, retry: bool = False, fresh: bool = False) -> bool:
        """Mark a trial failed and, with `retry`, put a copy in line that keeps its levels and identity."""
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
            **frozen.system_attrs,
            "failed_trial": (history or [frozen.number])[0],
            "retry_history": history,
        }
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=frozen.params,
                distributions=frozen.distributions,
                user_attrs=attributes,
                system_attrs=system,
                intermediate_values=frozen.intermediate_values,
            )
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
        self._set(number, state, values)

    def _set(self, number: int, state: TrialState, values: list[float] | None) -> None:
        # Where it is finished already, another process closed it with the same result.
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(number, state=state, values=values)


def directions(study: Study) -> list[Direction]:
    """Return `minimize` or `maximize` for each of a study's objectives."""
    return [goal.direction for goal in study.goals]


def objective_values(study: Study, record: Record) -> list[float] | None:
    """Return the study's objectives at the end of a trial; None where the trial diverged."""
    values = [goal.value(record.final) for goal in study.goals]
    known = [v for v in values if v is not None]
    return known if len(known) == len(values) and record.status != "diverged" else None


def _pruner(study: Study) -> optuna.pruners.BasePruner:
    if study.pruner == "halving":
        # The resource is tokens in units of one evaluation, so that trials of unlike batch sizes are compared fairly.
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if study.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    return optuna.pruners.NopPruner()
