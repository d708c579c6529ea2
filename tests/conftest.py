"""Settings shared by all tests: no telemetry, no network, and the cores shared out among pytest's workers."""

from __future__ import annotations

import gc
import os
import sqlite3
from pathlib import Path

import pytest

from ablate.study.threads import spin_little
from ablate.training.lifeline import COLLECT_AFTER

gc.set_threshold(COLLECT_AFTER)
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
spin_little()
# The process that starts the workers has no count, and must set nothing: they would find it.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


def pytest_collection_finish() -> None:
    """Leave what the imports made, a million objects, out of every later search for dead ones."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give it back, or Triton complains at the end that its objects are still there."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database: MLflow takes seconds to make one, so that it is made once and copied."""
    from ablate.tracking.store import prepare_store

    folder = tmp_path_factory.mktemp("store")
    prepare_store(f"sqlite:///{folder / 'mlflow.db'}")
    with sqlite3.connect(folder / "mlflow.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "mlflow.db"
