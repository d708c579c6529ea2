"""Follow studies and trials into MLflow: a run for each study, a child run for each trial, and no event is lost."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ablate.config import ConfigError
from ablate.config.endpoints import BPB
from ablate.evaluation.scores import columns
from ablate.results.columns import COST
from ablate.results.layout import MODEL, Layout
from ablate.results.record import Record, load_record
from ablate.study.address import DamagedStore, check_file, set_aside_database
from ablate.study.checkout import checkout_id
from ablate.study.designs import Plan, PlannedTrial
from ablate.tracking import tags as names
from ablate.tracking.machine import watched
from ablate.tracking.sender import Sender
from ablate.tracking.spool import Event, Spool, ends_with_result, finite, spool_path
from ablate.tracking.store import (
    dataset,
    default_uri,
    experiment_of,
    first_line,
    flat,
    metric_name,
    prepare_store,
    runs_of,
    source,
    study_run,
)
from ablate.training.result import Evaluation

RETRY_SECONDS = 15
ANSWER_SECONDS = 10
# MLflow's states for ours: a trial that diverged or was pruned ended as it should; its tag says how.
RUN_STATES = {
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "pruned": "FINISHED",
    "killed": "KILLED",
    "failed": "FAILED",
}

_log = logging.getLogger(__name__)


class MlflowTracker:
    """study.tracker.Tracker for MLflow; pickled into workers once the study's run is open."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.experiment: str | None = None
        self.parent: str | None = None
        self.checkout: str | None = None
        self.card: dict[str, Any] | None = None

    def check(self, layout: Layout, say: Callable[[str], None]) -> None:
        """Make the store ready: the project's own database, where damaged, is set aside and made new.

        Raises:
            ConfigError: it cannot be used.
        """
        try:
            check_file("tracking", self.uri)
            prepare_store(self.uri)
        except DamagedStore:
            if self.uri != default_uri(layout.root):
                raise
            say(f"MLflow's database was damaged: it is kept as {set_aside_database(self.uri)}, and made new")
            prepare_store(self.uri)

    def start_study(self, plan: Plan, layout: Layout, card: dict[str, Any] | None) -> None:
        """Open the study's run, or go on with it, and send what an earlier run of the study could not."""
        client = prepare_store(self.uri)
        self.card = card
        try:
            self.experiment = experiment_of(client, self.uri, layout)
            self.checkout = checkout_id(layout.root)
            own = self.uri == default_uri(layout.root)
            self.parent, made = study_run(
                client, self.experiment, plan.study, plan.space, plan.notes, self.checkout, own=own
            )
            client.update_run(self.parent, status="RUNNING")
            client.set_tag(self.parent, names.PLAN_HASH, plan.hash)
            client.log_artifact(self.parent, str(layout.plan))
            if card:
                client.log_inputs(self.parent, [dataset(card)])
        except MlflowException as error:
            raise ConfigError(
                f"tracking is {self.uri!r}: the study's run cannot be opened ({first_line(error)})"
            ) from None
        self.settle(layout, client)
        if made and layout.done():
            self._write_missing(layout, client, own=own)

    def open_trial(self, planned: PlannedTrial, layout: Layout) -> MlflowTrial:
        """Follow a trial; its events go to the server from a thread of their own."""
        spool = Spool(spool_path(layout, planned.hash))
        if not spool.events:
            spool.append(self._opening(planned, layout))
        return MlflowTrial(self.uri, spool, layout.folder(planned.hash) / MODEL)

    def end_study(self, plan: Plan, layout: Layout, status: str) -> None:
        """Send what is left and close the study's run; a server that is away gets it at the next run of the study."""
        client = MlflowClient(self.uri)
        self.settle(layout, client)
        try:
            assert self.parent is not None
            client.log_artifact(self.parent, str(layout.plan))
            client.set_tag(self.parent, names.STATUS, status)
            client.set_terminated(self.parent, status=RUN_STATES[status])
        except (MlflowException, OSError) as error:  # OSError: a full disk
            _log.warning("the study's run could not be closed (%s); run the study or `ablate doctor` again", error)

    def _opening(self, planned: PlannedTrial, layout: Layout) -> Event:
        tags = {
            names.PARENT_RUN: self.parent,
            names.ROLE: "trial",
            names.CHECKOUT: self.checkout,
            names.STUDY: layout.study,
            names.TRIAL: planned.hash,
            names.ARM: planned.arm,
            names.KIND: planned.kind,
            names.SEED: str(planned.seed),
            **source(layout.study),
        }
        return {
            "event": "open",
            "time": _now(),
            "experiment": self.experiment,
            "name": f"{planned.arm} · seed {planned.seed}" + (" · tune" if planned.kind == "tune" else ""),
            "tags": tags,
            "params": flat(planned.trial.model_dump(mode="json")),
            "card": self.card,
        }

    def whole(self, record: Record, layout: Layout, tables: Sequence[Path]) -> list[Event]:
        """A finished trial's events, for one that was never tracked; `experiment` and `parent` are set."""
        planned = PlannedTrial(
            arm=record.arm, kind=record.kind, seed=record.seed, trial=record.config, factors=record.factors
        )
        opening = self._opening(planned, layout)
        closing = _closing(record, tables, layout.folder(record.trial) / MODEL)
        return [opening, *(_metrics(e) for e in record.history), closing]

    def write(self, record: Record, layout: Layout, client: MlflowClient) -> None:
        """Write the run of a finished trial from its result. Raises MlflowException where the server is away."""
        spool = Spool(spool_path(layout, record.trial))
        for event in self.whole(record, layout, layout.tables_of(record.trial)):
            spool.append(event)
        Sender(client, spool).send()
        spool.remove()

    def _write_missing(self, layout: Layout, client: MlflowClient, *, own: bool) -> None:
        """Log finished trials of this study again, whose runs were lost with their database."""
        assert self.experiment is not None
        known = {r.data.tags.get(names.TRIAL) for r in runs_of(client, layout, self.experiment, own=own)}
        for name in sorted(layout.done() - known):
            try:
                self.write(load_record(layout.record(name)), layout, client)
            except (MlflowException, OSError) as error:
                _log.warning("MLflow is away, runs of finished trials are not written: %s", first_line(error))
                return

    def settle(self, layout: Layout, client: MlflowClient) -> None:
        """Send the events that trials of dead processes, or of times without a server, left behind."""
        for path in sorted(spool_path(layout, "any").parent.glob("*.jsonl")):
            spool = Spool(path)
            if not spool.events:
                spool.remove()
                continue
            try:
                self._complete(spool, layout)
                Sender(client, spool).send()
            except (MlflowException, OSError) as error:
                _log.warning("MLflow is away, %s is kept for later: %s", path.name, first_line(error))
                return
            if ends_with_result(spool):
                spool.remove()

    @staticmethod
    def _complete(spool: Spool, layout: Layout) -> None:
        """Add what a finished trial's process could not write down any more."""
        record = layout.record(spool.path.stem)
        if not record.exists() or ends_with_result(spool):
            return
        done = load_record(record)
        for evaluation in done.history:
            if evaluation.step not in spool.steps:
                spool.append(_metrics(evaluation))
        spool.append(_closing(done, layout.tables_of(spool.path.stem), layout.folder(spool.path.stem) / MODEL))


class MlflowTrial:
    """study.tracker.TrialTracker: writes events to the spool; a thread sends them."""

    def __init__(self, uri: str, spool: Spool, weights: Path) -> None:
        self.spool, self._weights = spool, weights
        self._uri = uri
        self._steps = spool.steps
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # Not a daemon: the process waits for the last events of its last trial.
        self._thread = threading.Thread(target=self._send, name="mlflow")
        self._last = False
        self._answered = threading.Event()
        if any(e["event"] == "run" for e in spool.events):
            spool.append({"event": "reopen"})
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """Waits a moment for the server's first answer; None where there is none."""
        self._answered.wait(timeout=ANSWER_SECONDS)
        return self.spool.run_id

    def evaluated(self, evaluation: Evaluation) -> bool:
        """Note an evaluation, unless this step was noted before the trial was interrupted."""
        if evaluation.step not in self._steps:
            self._steps.add(evaluation.step)
            self._append(_metrics(evaluation))
        return False

    def stepped(self, step: int, total: int) -> bool:
        """Nothing to note."""
        return False

    def finish(self, record: Record, tables: Sequence[Path]) -> None:
        """Close the run with the trial's result."""
        self._append(_closing(record, tables, self._weights), last=True)

    def abandon(self, status: str, message: str) -> None:
        """Close the run without a result; a later attempt opens it again."""
        tags = {names.STATUS: status, names.MESSAGE: message[:5000]}
        event = {
            "event": "close",
            "time": _now(),
            "status": RUN_STATES[status],
            "tags": tags,
            "metrics": {},
            "tables": [],
            "step": 0,
        }
        self._append(event, last=True)

    def close(self) -> None:
        """End the sending thread once it has sent what there is; without it the process would never end."""
        self._last = True
        self._wake.put(True)

    def _append(self, event: Event, *, last: bool = False) -> None:
        self.spool.append(event)
        if last:
            self.close()
        self._wake.put(True)

    def _send(self) -> None:
        """The sending thread: at every event, and every 15 s while the server is away, until the last event."""
        sender = Sender(MlflowClient(self._uri), self.spool)
        away_until = 0.0
        monitor = None
        while True:
            last = self._last
            if last or time.monotonic() >= away_until:
                try:
                    sender.send()
                    monitor = monitor or (None if last else watched(self.spool.run_id, self._uri))
                except (MlflowException, OSError) as error:  # OSError: a full disk
                    if last:
                        _log.warning("MLflow is away, events are kept for later: %s", first_line(error))
                        break
                    away_until = time.monotonic() + RETRY_SECONDS
                self._answered.set()
            if last:
                if ends_with_result(self.spool):
                    self.spool.remove()
                break
            try:
                self._wake.get(timeout=RETRY_SECONDS)
            except queue.Empty:
                continue
        if monitor:
            monitor.finish()


def _metrics(evaluation: Evaluation) -> Event:
    values = finite(
        {
            BPB.name: evaluation.bpb,
            names.TRAIN_LOSS: evaluation.train_loss,
            names.LR: evaluation.lr,
            names.TOKENS: evaluation.tokens,
            names.TRAIN_SECONDS: evaluation.seconds,
            **evaluation.task,
            **{names.shown(name): value for name, value in evaluation.balance.items()},
        }
    )
    return {"event": "metrics", "time": _now(), "step": evaluation.step, "values": values}


def _closing(record: Record, tables: Sequence[Path], weights: Path) -> Event:
    origin = record.provenance
    tags = {
        names.STATUS: record.status,
        names.MESSAGE: record.message,
        names.GIT_COMMIT: origin.git_commit,
        names.COMMIT: origin.git_commit,
        names.GIT_DIRTY: str(origin.git_dirty).lower(),
        names.DATA_HASH: origin.data_hash,
        names.TOKENIZER_HASH: origin.tokenizer_hash,
        names.MACHINE: origin.machine,
        names.DEVICE: origin.device,
        names.THREADS: str(origin.threads),
        names.VERSIONS: json.dumps(origin.versions, sort_keys=True),
    }
    metrics = finite(
        {
            names.TOKENS_PER_SECOND: record.tokens_per_second,
            names.SECONDS: record.seconds,
            **{name: getattr(record.cost, name) for name in COST},
            **{f"leaves/{name}": value for name, value in record.leaves.items()},
            **{f"trees/{name}": value for name, value in record.trees.items()},
            **{metric_name(name): value for name, value in columns(record.scores).items()},
        }
    )
    return {
        "event": "close",
        "time": _now(),
        "step": record.final.step,
        "status": RUN_STATES[record.status],
        "tags": {key: value for key, value in tags.items() if value},
        "metrics": metrics,
        "tables": [str(table) for table in tables],
        "model": str(weights) if record.config.train.keep_checkpoint and record.status == "finished" else None,
    }


def _now() -> int:
    return time.time_ns() // 1_000_000
