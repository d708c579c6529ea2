"""What is found after a run, logged to MLflow: a study's findings and report, a trial's evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ablate.config import ConfigError, load_study
from ablate.config.endpoints import ENDPOINTS
from ablate.evaluation.scores import Evaluated
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.results.record import load_record
from ablate.study.checkout import checkout_id
from ablate.tracking import tags as names
from ablate.tracking.spool import finite
from ablate.tracking.store import default_uri, experiment_of, metric_name, prepare_store, study_run

FOLDER = "report"
EVALUATION = "evaluation"


def log_report(study: str, root: Path, files: Iterable[str], *, tracking: str | None = None) -> str | None:
    """Log files and folders of out/<study>/ under `report/` of the study's run; the run's id.

    The run is that of the plan's space, made where there is none. Logging again replaces. None, and nothing is logged,
    where the study was not run here (there is no plan).

    Raises:
        ConfigError: no usable MLflow answers, or the plan or the study file is damaged.
    """
    root = root.resolve()
    layout, uri = Layout(root, study), tracking or default_uri(root)
    plan = load_plan(layout)
    if plan is None or "space" not in plan:
        return None
    client = prepare_store(uri)
    with _refused(uri, "the report"):
        experiment = experiment_of(client, uri, layout)
        settings = load_study(root / "studies" / f"{study}.yaml")
        run, made = study_run(
            client,
            experiment,
            settings,
            plan["space"],
            plan["notes"],
            checkout_id(root),
            own=uri == default_uri(root),
        )
        if made:  # any other is the study's own to close
            client.set_terminated(run, status="FINISHED")
        _summarise(client, experiment, run, layout.report)
        for path in (layout.report / name for name in files):
            if path.is_dir():
                client.log_artifacts(run, str(path), f"{FOLDER}/{path.name}")
            elif path.exists():
                client.log_artifact(run, str(path), FOLDER)
    return run


def _summarise(client: MlflowClient, experiment: str, run: str, report: Path) -> None:
    """Give the study's run what its findings come to: best and reference values, verdict counts, a link to the report."""
    try:
        findings = json.loads((report / "findings.json").read_text(encoding="utf-8"))
        arms, reference = findings["arms"], findings["reference"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    values: dict[str, Any] = {k: v for k, v in findings["summary"].items() if isinstance(v, int | float)}
    values |= {
        f"reference_{name}": found[name]["mean"]
        for found in arms
        if found["arm"] == reference
        for name in ENDPOINTS
        if found.get(name)
    }
    everything = [f for key in ("findings", "recovered", "pruning") for f in findings[key]]
    values |= {v: sum(f["verdict"] == v for f in everything) for v in ("supported", "refuted", "inconclusive")}
    now = time.time_ns() // 1_000_000
    metrics = [Metric(metric_name(k), v, now, 0) for k, v in finite(values).items()]
    tags = [RunTag(f"ablate.{k}", v) for k, v in findings["summary"].items() if isinstance(v, str)]
    link = f"[Report](#/experiments/{experiment}/runs/{run}/artifacts/{FOLDER}/index.html)"
    note = client.get_run(run).data.tags.get(names.NOTE, "")
    if link not in note:
        tags.append(RunTag(names.NOTE, "\n\n".join(part for part in (note, link) if part)))
    client.log_batch(run, metrics=metrics, tags=tags)


def log_evaluation(found: Evaluated, files: Iterable[Path], root: Path, *, tracking: str | None = None) -> list[str]:
    """Log an evaluation to the runs of its trial in every study that has it; their ids.

    Values go under `evaluation/<name>`, so that they do not replace what the trial itself measured; `files`
    become artifacts under `evaluation/`. Evaluating again adds the new values and replaces the files.

    Raises:
        ConfigError: no usable MLflow answers, or it does not know the run.
    """
    root = root.resolve()
    records = [load_record(path) for path in sorted((root / "results").glob(f"*/{found.trial}.json"))]
    runs = [record.run_id for record in records if record.run_id is not None]
    if not runs:
        return []
    files = list(files)
    uri, now = tracking or default_uri(root), time.time_ns() // 1_000_000
    values = finite(found.metrics())
    metrics = [Metric(metric_name(f"{EVALUATION}/{name}"), value, now, 0) for name, value in values.items()]
    client = prepare_store(uri)
    with _refused(uri, "the evaluation"):
        for run in runs:
            client.log_batch(run, metrics=metrics)
            for path in files:
                client.log_artifact(run, str(path), EVALUATION)
    return runs


@contextmanager
def _refused(uri: str, what: str) -> Iterator[None]:
    """MLflow's errors as one line."""
    try:
        yield
    except MlflowException as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"tracking is {uri!r}: {what} could not be logged ({reason})") from None
