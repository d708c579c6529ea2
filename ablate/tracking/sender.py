"""Send a trial's events to MLflow, in order and once."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ablate.tracking import tags as names
from ablate.tracking.models import log_model
from ablate.tracking.preview import previews
from ablate.tracking.spool import Event, Spool
from ablate.tracking.store import batches, dataset, first_line

# Errors that sending again cannot mend: the run was deleted by hand, or the server refuses the value.
HOPELESS = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"}

_log = logging.getLogger(__name__)


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
                _log.warning("MLflow refuses an event of %s: %s", self.spool.path.name, first_line(error))
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
        for batch in batches(event["params"]):
            self.client.log_batch(self._run, params=batch)
        if event["card"]:
            self.client.log_inputs(self._run, [dataset(event["card"])])

    def _created(self, event: Event) -> str | None:
        """The run, where a process was killed between making it and noting its id."""
        tags = event["tags"]
        wanted = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (names.TRIAL, names.PARENT_RUN))
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
        self._preview()
        if event.get("model") and Path(event["model"]).exists():
            log_model(self.client, self._id, Path(event["model"]))
        self.client.set_terminated(self._id, status=event["status"], end_time=event["time"])

    def _preview(self) -> None:
        """Log pictures of what the tables hold: MLflow shows no parquet."""
        history = {e["step"]: e["values"] for e in self.spool.events if e["event"] == "metrics"}
        if history:
            with tempfile.TemporaryDirectory(prefix="ablate-preview-") as folder:
                for path in previews(history, Path(folder)):
                    self.client.log_artifact(self._id, str(path), "preview")

    @property
    def _id(self) -> str:
        assert self._run is not None, "a spool starts with its `open` event"
        return self._run
