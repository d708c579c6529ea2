"""A trial as MLflow's run holds it: its settings, its tags and its quality by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from ablate.config import ConfigError, Trial, parse
from ablate.config.endpoints import quality_of
from ablate.tracking import tags as names
from ablate.tracking.store import default_uri, prepare_store


def logged(run_id: str, root: Path, tracking: str | None) -> tuple[Trial, dict[str, str], dict[int, float]]:
    """Return the settings, tags and quality by step of a trial's run.

    Raises:
        ConfigError: there is no such run, it is not a trial's, or its settings are not valid any more.
    """
    uri = tracking or default_uri(root.resolve())
    client = prepare_store(uri)
    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise ConfigError(
            f"run {run_id!r} is unknown: no result in 'results', no published one in 'reports', and no run at {uri} has it"
        ) from None
    tags = dict(run.data.tags)
    if tags.get(names.ROLE) != "trial":
        raise ConfigError(f"run {run_id!r} is a {tags.get(names.ROLE, 'foreign')} run: give the id of a trial's run")
    trial = parse(Trial, _nested(run.data.params), where=f"run {run_id}")
    history = client.get_metric_history(run_id, quality_of(trial.task.kind).name)
    return trial, tags, {metric.step: metric.value for metric in history}


def _nested(params: dict[str, str]) -> dict[str, Any]:
    """Dotted parameters as nested settings; texts are read as they are, everything else as JSON."""
    data: dict[str, Any] = {}
    for key, text in params.items():
        *sections, field = key.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        try:
            place[field] = json.loads(text)
        except json.JSONDecodeError:
            place[field] = text
    return data
