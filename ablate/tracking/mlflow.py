"""Thin glue to MLflow: a run for each study, a child run for each trial, and nothing lost while the server is away."""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A server that is away must not hold a trial up; what could not be sent is sent again later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
# With a server MLflow prints a run's address when it ends, in the midst of `--json`.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.engine import make_url

from ablate.config import ConfigError, Section, Study
from ablate.evaluation.scores import columns
from ablate.study.designs import Plan, PlannedTrial
from ablate.study.records import Layout, Record, load_record
from ablate.tracking import schema
from ablate.tracking.spool import Event, Spool, finite
from ablate.training.result import Evaluation

RETRY_SECONDS = 15
ANSWER_SECONDS = 10
PARAMS_A_BATCH = 100
JOBS = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"
# MLflow's states for ours: a trial that diverged or was pruned ended as it should; its tag says how.
RUN_STATES = {
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "pruned": "FINISHED",
    "killed": "KILLED",
    "failed": "FAILED",
}
# Errors that sending again cannot mend: the run was deleted by hand, or the server refuses the value.
HOPELESS = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"}

_log = logging.getLogger(__name__)


def default_uri(root: Path) -> str:
    """The SQLite database under the project's state folder, as an absolute URI."""
    return f"sqlite:///{(root / 'state' / 'mlflow.db').resolve()}"


def prepare_store(uri: str) -> MlflowClient:
    """Make the tracking store ready, once, before several processes use it: create it, migrate an old one.

    Raises:
        ConfigError: the URI is none, or no usable server or database answers.
    """
    file = sqlite_file(uri)
    if file is None:
        return _checked(uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Four processes that open a fresh database at once leave it half migrated and unusable.
    with FileLock(file.with_name(f".{file.name}.lock")):
        try:
            with sqlite3.connect(file) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            connection.close()
        except sqlite3.Error as error:
            raise ConfigError(f"tracking is {uri!r}: the database cannot be used: {error}") from None
        return _checked(uri)


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI, None for any other."""
    if not uri.startswith("sqlite:"):
        return None
    database = make_url(uri).database
    if not database or not Path(database).is_absolute():
        raise ConfigError(f"tracking is {uri!r}: an absolute path is expected, sqlite:////path/to/mlflow.db")
    return Path(database)


def _checked(uri: str) -> MlflowClient:
    if uri.split(":")[0] not in {"sqlite", "postgresql", "mysql", "mssql", "http", "https"}:
        raise ConfigError(f"tracking is {uri!r}: sqlite:////path, postgresql://… or http(s)://… is expected")
    client = MlflowClient(uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        if "out-of-date database schema" not in str(error):
            raise ConfigError(f"tracking is {uri!r}: no MLflow answers there ({_first_line(error)})") from None
        upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
        done = subprocess.run(upgrade, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(
                f"tracking is {uri!r}: its database could not be migrated; run {' '.join(upgrade)}"
            ) from None
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def serve(root: Path, port: int = 5000, uri: str | None = None) -> int:
    """Run MLflow's UI on 127.0.0.1 (it has no authentication) until Ctrl-C; prints its address. Returns its exit code.

    Raises ConfigError for a store that cannot be used, and for a port that is taken.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(root)
    if uri.startswith("http"):
        print(f"MLflow runs at {uri}")
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"port is {port}: it cannot be used ({error.strerror}); choose another") from None
    studies = prepare_store(uri).search_experiments(order_by=["name"])
    address = f"http://127.0.0.1:{port}"
    print(f"MLflow at {address} (Ctrl-C ends it)", flush=True)
    for study in studies:
        # Without the workflow type MLflow 3 opens an experiment on its pages for prompts and traces, not on its runs.
        if study.name != "Default":
            print(
                f"  {study.name}: {address}/#/experiments/{study.experiment_id}/runs?workflowType=machine_learning",
                flush=True,
            )
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    try:
        # Its job workers serve prompts and traces, which are not used here.
        return subprocess.run(command, check=False, env={**os.environ, JOBS: "false"}).returncode
    except KeyboardInterrupt:
        return 130


class MlflowTracker:
    """study.records.Tracker for MLflow; pickled into workers once the study's run is open."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.experiment: str | None = None
        self.parent: str | None = None
        self.card: dict[str, Any] | None = None

    def start_study(self, plan: Plan, layout: Layout, card: dict[str, Any] | None) -> None:
        """Open the study's run, or go on with it, and send what an earlier run of the study could not."""
        client = prepare_store(self.uri)
        self.card = card
        try:
            self.experiment = experiment_of(client, self.uri, layout)
            self.parent, _ = study_run(client, self.experiment, plan.study, plan.space, plan.notes)
            client.update_run(self.parent, status="RUNNING")
            client.set_tag(self.parent, schema.PLAN_HASH, plan.hash)
            client.log_artifact(self.parent, str(layout.plan))
            if card:
                client.log_inputs(self.parent, [_dataset(card)])
        except MlflowException as error:
            raise ConfigError(
                f"tracking is {self.uri!r}: the study's run cannot be opened ({_first_line(error)})"
            ) from None
        self.settle(layout, client)

    def open_trial(self, planned: PlannedTrial, layout: Layout) -> MlflowTrial:
        """Follow a trial; its events go to the server from a thread of their own."""
        spool = Spool(spool_path(layout, planned.hash))
        if not spool.events:
            spool.append(self._opening(planned, layout))
        return MlflowTrial(self.uri, spool)

    def end_study(self, plan: Plan, layout: Layout, status: str) -> None:
        """Send what is left and close the study's run; a server that is away gets it at the next run of the study."""
        client = MlflowClient(self.uri)
        self.settle(layout, client)
        try:
            assert self.parent is not None
            client.log_artifact(self.parent, str(layout.plan))
            client.set_tag(self.parent, schema.STATUS, status)
            client.set_terminated(self.parent, status=RUN_STATES[status])
        except MlflowException as error:
            _log.warning("the study's run could not be closed (%s); run the study or `ablate doctor` again", error)

    def _opening(self, planned: PlannedTrial, layout: Layout) -> Event:
        tags = {
            schema.PARENT_RUN: self.parent,
            schema.ROLE: "trial",
            schema.STUDY: layout.study,
            schema.TRIAL: planned.hash,
            schema.ARM: planned.arm,
            schema.KIND: planned.kind,
            schema.SEED: str(planned.seed),
        }
        return {
            "event": "open",
            "time": _now(),
            "experiment": self.experiment,
            "name": f"{planned.arm} · seed {planned.seed}" + (" · tune" if planned.kind == "tune" else ""),
            "tags": tags,
            "params": _flat(planned.trial.model_dump(mode="json")),
            "card": self.card,
        }

    def whole(self, record: Record, layout: Layout, tables: Sequence[Path]) -> list[Event]:
        """A finished trial's events, for one that was never tracked; `experiment` and `parent` are set."""
        planned = PlannedTrial(
            arm=record.arm, kind=record.kind, seed=record.seed, trial=record.config, factors=record.factors
        )
        opening = self._opening(planned, layout)
        return [opening, *(_metrics(e) for e in record.history), _closing(record, tables)]

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
                _log.warning("MLflow is away, %s is kept for later: %s", path.name, _first_line(error))
                return
            if _ends_with_result(spool):
                spool.remove()

    @staticmethod
    def _complete(spool: Spool, layout: Layout) -> None:
        """Add what a finished trial's process could not write down any more."""
        record = layout.record(spool.path.stem)
        if not record.exists() or _ends_with_result(spool):
            return
        done = load_record(record)
        for evaluation in done.history:
            if evaluation.step not in spool.steps:
                spool.append(_metrics(evaluation))
        spool.append(_closing(done, layout.tables_of(spool.path.stem)))


class MlflowTrial:
    """study.records.TrialTracker: writes events to the spool; a thread sends them."""

    def __init__(self, uri: str, spool: Spool) -> None:
        self.spool = spool
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
        self._append(_closing(record, tables), last=True)

    def abandon(self, status: str, message: str) -> None:
        """Close the run without a result; a later attempt opens it again."""
        tags = {schema.STATUS: status, schema.MESSAGE: message[:5000]}
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
        while True:
            last = self._last
            if last or time.monotonic() >= away_until:
                try:
                    sender.send()
                except (MlflowException, OSError) as error:  # OSError: a full disk
                    if last:
                        _log.warning("MLflow is away, events are kept for later: %s", _first_line(error))
                        return
                    away_until = time.monotonic() + RETRY_SECONDS
                self._answered.set()
            if last:
                if _ends_with_result(self.spool):
                    self.spool.remove()
                return
            try:
                self._wake.get(timeout=RETRY_SECONDS)
            except queue.Empty:
                continue


class Sender:
    """Sends a spool's events in order; after an error it goes on where it stopped."""

    def __init__(self, client: MlflowClient, spool: Spool) -> None:
        self.client, self.spool = client, spool
        self._sent = 0
        self._run = spool.run_id
        self._gone = False
        self._handlers: dict[str, Callable[[Event], None]] = {
            "open": self._open,
            "run": self._known,
            "reopen": self._reopen,
            "metrics": self._metrics,
            "close": self._close,
        }

    def send(self) -> None:
        """Send all that is unsent. Raises MlflowException where the server cannot be reached or is locked."""
        while self._sent < len(self.spool.events):
            event = self.spool.events[self._sent]
            try:
                if not self._gone:
                    self._handlers[event["event"]](event)
            except MlflowException as error:
                if error.error_code not in HOPELESS:
                    raise
                # For instance a run that was deleted in the UI: its trial goes on, its events have nowhere to go.
                _log.warning("MLflow refuses an event of %s: %s", self.spool.path.name, _first_line(error))
                self._gone = error.error_code == "RESOURCE_DOES_NOT_EXIST"
            self._sent += 1

    def _open(self, event: Event) -> None:
        if self._run is None:
            self._run = (
                self._created(event)
                or self.client.create_run(
                    event["experiment"], start_time=event["time"], tags=event["tags"], run_name=event["name"]
                ).info.run_id
            )
            self.spool.append({"event": "run", "run_id": self._run})
        for batch in _batches(event["params"]):
            self.client.log_batch(self._run, params=batch)
        if event["card"]:
            self.client.log_inputs(self._run, [_dataset(event["card"])])

    def _created(self, event: Event) -> str | None:
        """The run, where a process was killed between making it and noting its id."""
        tags = event["tags"]
        wanted = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (schema.TRIAL, schema.PARENT_RUN))
        for run in self.client.search_runs([event["experiment"]], wanted, max_results=10):
            if run.info.start_time == event["time"]:
                return str(run.info.run_id)
        return None

    def _known(self, event: Event) -> None:
        self._run = event["run_id"]

    def _reopen(self, event: Event) -> None:
        self.client.update_run(self._id, status="RUNNING")

    def _metrics(self, event: Event) -> None:
        metrics = [Metric(key, value, event["time"], event["step"]) for key, value in event["values"].items()]
        self.client.log_batch(self._id, metrics=metrics)

    def _close(self, event: Event) -> None:
        metrics = [Metric(key, value, event["time"], event["step"]) for key, value in event["metrics"].items()]
        tags = [RunTag(key, value) for key, value in event["tags"].items()]
        self.client.log_batch(self._id, metrics=metrics, tags=tags)
        for table in event["tables"]:
            if Path(table).exists():
                self.client.log_artifact(self._id, table)
        self.client.set_terminated(self._id, status=event["status"], end_time=event["time"])

    @property
    def _id(self) -> str:
        assert self._run is not None, "a spool starts with its `open` event"
        return self._run


def spool_path(layout: Layout, trial: str) -> Path:
    """Where a trial's unsent events lie."""
    return layout.state / "spool" / layout.study / f"{trial}.jsonl"


def _ends_with_result(spool: Spool) -> bool:
    """Whether the trial is done for good, so that no later attempt needs to know what was sent."""
    return spool.closed and spool.last["tags"][schema.STATUS] not in {"killed", "failed"}


def _metrics(evaluation: Evaluation) -> Event:
    values = finite(
        {
            schema.BPB: evaluation.bpb,
            schema.TRAIN_LOSS: evaluation.train_loss,
            schema.LR: evaluation.lr,
            schema.TOKENS: evaluation.tokens,
            schema.TRAIN_SECONDS: evaluation.seconds,
            **evaluation.balance,
        }
    )
    return {"event": "metrics", "time": _now(), "step": evaluation.step, "values": values}


def _closing(record: Record, tables: Sequence[Path]) -> Event:
    origin = record.provenance
    tags = {
        schema.STATUS: record.status,
        schema.MESSAGE: record.message,
        schema.GIT_COMMIT: origin.git_commit,
        schema.GIT_DIRTY: str(origin.git_dirty).lower(),
        schema.DATA_HASH: origin.data_hash,
        schema.TOKENIZER_HASH: origin.tokenizer_hash,
        schema.MACHINE: origin.machine,
        schema.DEVICE: origin.device,
        schema.THREADS: str(origin.threads),
        schema.VERSIONS: json.dumps(origin.versions, sort_keys=True),
    }
    metrics = finite(
        {
            schema.TOKENS_PER_SECOND: record.tokens_per_second,
            schema.SECONDS: record.seconds,
            **{name: getattr(record.cost, name) for name in schema.COST},
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
    }


def study_run(
    client: MlflowClient, experiment: str, study: Study, space: str, notes: Sequence[str]
) -> tuple[str, bool]:
    """The run of a study and its space, made where there is none; and whether it was made just now."""
    wanted = f"tags.`{schema.ROLE}` = 'study' and tags.`{schema.SPACE}` = '{space}'"
    found = client.search_runs([experiment], wanted, run_view_type=ViewType.ACTIVE_ONLY, max_results=1)
    if found:
        return str(found[0].info.run_id), False
    tags = {
        schema.ROLE: "study",
        schema.STUDY: study.name,
        schema.SPACE: space,
        schema.DESIGN: study.design,
        schema.NOTE: "\n\n".join(part for part in (study.title, study.notes, *notes) if part),
    }
    run = client.create_run(experiment, tags=tags, run_name=study.name)
    for batch in _batches(_flat(study.model_dump(mode="json"))):
        client.log_batch(run.info.run_id, params=batch)
    return str(run.info.run_id), True


def experiment_of(client: MlflowClient, uri: str, layout: Layout) -> str:
    """The experiment of a study, made where there is none and restored where it was deleted."""
    found: Experiment | None = client.get_experiment_by_name(layout.study)
    if found is None:
        # Artifacts lie beside a local database; a server decides itself.
        local = sqlite_file(uri) is not None
        artifacts = (layout.state / "artifacts" / layout.study).resolve().as_uri() if local else None
        return str(client.create_experiment(layout.study, artifact_location=artifacts))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _dataset(card: dict[str, Any]) -> DatasetInput:
    source = card["source"]
    dataset = Dataset(
        name=str(source.get("name") or source.get("source") or "corpus"),
        digest=str(card["data_hash"])[:36],
        source_type="local",
        source=json.dumps(source),
        profile=json.dumps(card),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _flat(data: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted parameters; lists as JSON."""
    if isinstance(data, Section):
        data = data.model_dump(mode="json")
    if not isinstance(data, dict):
        return {prefix: data if isinstance(data, str) else json.dumps(data)}
    flat: dict[str, str] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _batches(params: dict[str, str]) -> Iterator[list[Param]]:
    items = [Param(metric_name(key), value[:6000]) for key, value in params.items()]
    for start in range(0, len(items), PARAMS_A_BATCH):
        yield items[start : start + PARAMS_A_BATCH]


def metric_name(key: str) -> str:
    """A parameter's or metric's name with the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in key)[:250]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


def _now() -> int:
    return time.time_ns() // 1_000_000
