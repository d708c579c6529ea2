"""MLflow's pages: serve them, and show a study's runs with the columns that its question is about."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

from mlflow.entities import Experiment
from mlflow.tracking import MlflowClient

from ablate.config import ConfigError, Study
from ablate.config.endpoints import measured_by

VIEW = "ablate"
"""Name of the view that links to a study's runs ask for."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Tag of an experiment in which MLflow's pages look for a view that somebody shared."""
JOBS = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"
BACKEND = "MLFLOW_BACKEND_STORE_URI"
"""Where MLflow's server finds the database: its arguments could be read by every user of the machine."""


def show_columns(client: MlflowClient, experiment: str, study: Study) -> None:
    """Have the link to a study's runs show one row a trial, the best first, with quality and balance as columns.

    MLflow itself shows the study's run alone, with its trials folded away and no metric.
    """
    quality = study.quality
    view = {
        "orderByKey": f"metrics.`{quality.name}`",
        "orderByAsc": quality.better == "lower",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": [f"metrics.`{endpoint.name}`" for endpoint in measured_by(study.task)],
    }
    client.set_experiment_tag(experiment, VIEW_TAG, json.dumps(view))


def runs_page(address: str, experiment: Experiment) -> str:
    """Return the address of an experiment's list of runs.

    Without the workflow type MLflow 3 opens an experiment on its pages for prompts and traces.
    """
    page = f"{address}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    return f"{page}&viewStateShareKey={VIEW}" if VIEW_TAG in experiment.tags else page


def check_port(port: int) -> None:
    """Raise ConfigError for a port that cannot be served on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"port is {port}: it cannot be used ({error.strerror}); choose another") from None


def serve(store: str, studies: list[Experiment], port: int) -> int:
    """Run MLflow's UI on 127.0.0.1 (it has no authentication) until Ctrl-C. Returns its exit code.

    Prints the address and one of each study once the server answers.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Its job workers serve prompts and traces, which are not used here. A session of its own: the server starts others,
    # which end with it.
    environment = {**os.environ, JOBS: "false", BACKEND: store}
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        if _answers(process, port):
            address = f"http://127.0.0.1:{port}"
            print(f"MLflow at {address} (Ctrl-C ends it)", flush=True)
            for study in studies:
                print(f"  {study.name}: {runs_page(address, study)}", flush=True)
        return process.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server takes connections; False where it ended before."""
    while process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.1)
    return False
