"""A study's findings and report as artifacts of its MLflow run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlflow.exceptions import MlflowException

from ablate.config import ConfigError, load_study
from ablate.study.records import Layout, load_plan
from ablate.tracking.mlflow import default_uri, experiment_of, prepare_store, study_run

FOLDER = "report"


def publish(study: str, root: Path, names: Iterable[str], *, tracking: str | None = None) -> str | None:
    """Log files and folders of reports/<study>/ under `report/` of the study's run; the run's id.

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
    try:
        experiment = experiment_of(client, uri, layout)
        settings = load_study(root / "studies" / f"{study}.yaml")
        run, made = study_run(client, experiment, settings, plan["space"], plan.get("notes", []))
        if made:  # any other is the study's own to close
            client.set_terminated(run, status="FINISHED")
        for path in (root / "reports" / study / name for name in names):
            if path.is_dir():
                client.log_artifacts(run, str(path), f"{FOLDER}/{path.name}")
            elif path.exists():
                client.log_artifact(run, str(path), FOLDER)
    except MlflowException as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"tracking is {uri!r}: the report could not be logged ({reason})") from None
    return run
