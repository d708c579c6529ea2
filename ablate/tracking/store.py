"""MLflow's store: make it ready, find the runs of a study, put values in the form it takes."""

from __future__ import annotations

import getpass
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Param, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ablate.config import ConfigError, Section, Study, digest, masked
from ablate.results.layout import Layout
from ablate.study.address import alone_with, check_address, refusals, sqlite_path, sqlite_url
from ablate.study.checkout import checkout_id
from ablate.study.threads import environment
from ablate.tracking import tags as names
from ablate.tracking.pages import show_columns

PARAMS_A_BATCH = 100
LONGEST_NAME = 250
"""Characters of a parameter's or metric's name."""
MIGRATED = "ABLATE_MIGRATED_STORE"
STORES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
"""Kinds of store that MLflow knows."""
ANSWER_SECONDS = 12
"""How long a server may take to answer before a command starts."""


def default_uri(root: Path) -> str:
    """The SQLite database under the project's state folder, as an absolute URI."""
    return sqlite_url(root / "state" / "mlflow.db")


def prepare_store(uri: str) -> MlflowClient:
    """Make the tracking store ready, once, before several processes use it: create it, migrate an old one.

    Raises:
        DamagedStore: the database file is damaged, or none.
        ConfigError: the URI is none, or no usable server or database answers within seconds.
    """
    check_address("tracking", uri, STORES)
    if uri.startswith("http"):
        with refusals("tracking", uri):
            return _answering(uri)
    file = sqlite_file(uri)
    # Four processes that open a fresh database at once leave it half migrated and unusable.
    with alone_with("tracking", uri, "mlflow tables"), refusals("tracking", uri):
        if file is not None:
            with closing(sqlite3.connect(file)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        try:
            return _opened(uri)
        except MlflowException as error:
            if "out-of-date database schema" not in str(error):
                raise
        _migrate(uri)
        return _opened(uri)


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI, None for any other."""
    file = sqlite_path(uri)
    if file is not None and not file.is_absolute():
        raise ConfigError(f"tracking is {uri!r}: an absolute path is expected, sqlite:////path/to/mlflow.db")
    return file


def _opened(uri: str) -> MlflowClient:
    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def _answering(uri: str) -> MlflowClient:
    """Ask a server some times within ANSWER_SECONDS; MLflow itself would go on asking for minutes."""
    end = time.monotonic() + ANSWER_SECONDS
    while True:
        left = end - time.monotonic()
        limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(left))), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        try:
            with environment(limits):
                return _opened(uri)
        except MlflowException:
            if end - time.monotonic() < 2:
                raise
            time.sleep(2)


def _migrate(uri: str) -> None:
    """Bring the tables of an older MLflow up to date, in a process of its own: MLflow's migrations print a lot."""
    code = f"import os; from mlflow.db import upgrade; upgrade.callback(os.environ[{MIGRATED!r}])"
    # Its address is not among the arguments, which every user of the machine can read.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, MIGRATED: uri}
    )
    if done.returncode:
        last = next(reversed(done.stderr.strip().splitlines()), "")
        newer = "locate revision" in done.stderr
        raise ConfigError(
            f"tracking is {masked(uri)!r}: its tables are of "
            + ("a newer MLflow; update mlflow" if newer else f"another MLflow and cannot be migrated ({last[:200]})")
            + ", or move the database away: `ablate doctor --fix` writes finished trials into a new one"
        )


def study_run(
    client: MlflowClient, experiment: str, study: Study, space: str, notes: Sequence[str], checkout: str, *, own: bool
) -> tuple[str, bool]:
    """The run of a checkout's study and its space, made where there is none; and whether it was made just now.

    `own` says that nobody else uses the store: a run without a checkout's name, of an earlier version, is its own then.
    """
    show_columns(client, experiment, study)
    wanted = f"tags.`{names.ROLE}` = 'study' and tags.`{names.SPACE}` = '{space}'"
    for run in client.search_runs([experiment], wanted, run_view_type=ViewType.ACTIVE_ONLY, max_results=1000):
        owner = run.data.tags.get(names.CHECKOUT)
        if owner == checkout or (own and owner is None):
            if owner is None:
                client.set_tag(run.info.run_id, names.CHECKOUT, checkout)
            return str(run.info.run_id), False
    tags = {
        names.ROLE: "study",
        names.CHECKOUT: checkout,
        names.STUDY: study.name,
        names.SPACE: space,
        names.DESIGN: study.design,
        names.NOTE: "\n\n".join(part for part in (study.title, study.notes, *notes) if part),
        **source(study.name),
    }
    run = client.create_run(experiment, tags=tags, run_name=study.name)
    for batch in batches(flat(study.model_dump(mode="json"))):
        client.log_batch(run.info.run_id, params=batch)
    return str(run.info.run_id), True


def source(study: str) -> dict[str, str]:
    """Return the tags of what made a run and who ran it: MLflow's columns Source and Created by."""
    tags = {names.SOURCE: f"ablate study run studies/{study}.yaml", names.SOURCE_TYPE: "LOCAL"}
    try:
        return tags | {names.USER: getpass.getuser()}
    except (OSError, KeyError):  # a container's user without a name
        return tags


def runs_of(client: MlflowClient, layout: Layout, experiment: str, *, own: bool) -> Iterator[Run]:
    """Yield the runs of an experiment that this checkout made; another's are none of its business.

    Runs of earlier versions bear no checkout's name: they are its own where nobody else uses the store (`own`).
    """
    checkout = checkout_id(layout.root)
    token: Any = None
    while True:
        page = client.search_runs([experiment], "", ViewType.ACTIVE_ONLY, 1000, None, token)
        for run in page:
            owner = run.data.tags.get(names.CHECKOUT)
            if owner == checkout or (own and owner is None):
                yield run
        token = page.token
        if not token:
            return


def experiment_of(client: MlflowClient, uri: str, layout: Layout) -> str:
    """The experiment of a study, made where there is none and restored where it was deleted."""
    found: Experiment | None = client.get_experiment_by_name(layout.study)
    if found is None:
        # Artifacts go next to a local database; a server decides itself.
        file = sqlite_file(uri)
        artifacts = None if file is None else (file.parent / "artifacts" / layout.study).resolve().as_uri()
        kind = {names.EXPERIMENT_KIND: names.MODEL_TRAINING}
        return str(client.create_experiment(layout.study, artifact_location=artifacts, tags=kind))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    if names.EXPERIMENT_KIND not in found.tags:  # made by an earlier version
        client.set_experiment_tag(found.experiment_id, names.EXPERIMENT_KIND, names.MODEL_TRAINING)
    return str(found.experiment_id)


def dataset(card: dict[str, Any]) -> DatasetInput:
    """Return a corpus's data card as an input of a run."""
    source = card["source"]
    dataset = Dataset(
        name=str(source.get("name") or source.get("source") or "corpus"),
        digest=str(card["data_hash"])[:36],
        source_type="local",
        source=json.dumps(source),
        profile=json.dumps(card),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def flat(data: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted parameters; lists as JSON."""
    if isinstance(data, Section):
        data = data.model_dump(mode="json")
    if not isinstance(data, dict):
        return {prefix: data if isinstance(data, str) else json.dumps(data)}
    found: dict[str, str] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def batches(params: dict[str, str]) -> Iterator[list[Param]]:
    """Yield parameters in groups that one request can hold."""
    items = [Param(metric_name(key), value[:6000]) for key, value in params.items()]
    for start in range(0, len(items), PARAMS_A_BATCH):
        yield items[start : start + PARAMS_A_BATCH]


def metric_name(key: str) -> str:
    """Return a parameter's or metric's name as MLflow takes it; two names that differ stay two.

    MLflow allows some characters, 250 of them, and no name that means another one as a path (`a/../b`). A name that had
    to be changed ends in a digest of what it was.
    """
    kept = "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in key)
    kept = "/".join("_" if part in {"", ".", ".."} else part for part in kept.split("/"))
    return kept if kept == key and len(key) <= LONGEST_NAME else f"{kept[: LONGEST_NAME - 9]}_{digest(key)[:8]}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, shortened."""
    return str(error).strip().splitlines()[0][:200]
