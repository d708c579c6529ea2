"""Kept weights as a model of MLflow, which `mlflow.pytorch.load_model` loads."""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from mlflow.entities import LoggedModelOutput
from mlflow.tracking import MlflowClient

from ablate.tracking import tags as names

NAME = "model"


def log_model(client: MlflowClient, run: str, weights: Path) -> None:
    """Log a trial's weights as a model of its run, with signature and input example, and as files under `model/`.

    A run that has a model keeps it: sending again logs no second one.
    """
    logged = client.get_run(run)
    if logged.outputs and logged.outputs.model_outputs:
        return
    with tempfile.TemporaryDirectory(prefix="ablate-model-") as folder:
        place = Path(folder) / NAME
        _save(weights, place)
        client.log_artifacts(run, str(place), NAME)
        tags = {names.TRIAL: logged.data.tags.get(names.TRIAL, "")}
        made = client.create_logged_model(logged.info.experiment_id, name=NAME, source_run_id=run, tags=tags)
        client.log_model_artifacts(made.model_id, str(place))
        client.finalize_logged_model(made.model_id, "READY")
        client.log_outputs(run, [LoggedModelOutput(made.model_id, step=0)])


def _save(weights: Path, place: Path) -> None:
    """Write the model in MLflow's format: it takes token ids [batch, positions] and gives logits."""
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    from ablate.training.checkpoint import load_model

    model, trial, _ = load_model(weights)
    ids = np.arange(trial.model.context, dtype=np.int64)[None] % model.embedding.shape[0]
    inputs = Schema([TensorSpec(ids.dtype, (-1, -1))])
    outputs = Schema([TensorSpec(np.dtype("float32"), (-1, -1, model.embedding.shape[0]))])
    with _quiet():
        mlflow.pytorch.save_model(
            model,
            str(place),
            signature=ModelSignature(inputs=inputs, outputs=outputs),
            input_example=ids,
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy")],
            serialization_format="pickle",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's warning on pickle: the class of the model is this project's own, and so would an export's operators be."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
