"""Settings shared by all tests: no telemetry, no network, as many threads as there are cores."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database: MLflow takes seconds to make one, so that it is made once and copied."""
    from ablate.tracking.store import prepare_store

    folder = tmp_path_factory.mktemp("store")
    prepare_store(f"sqlite:///{folder / 'mlflow.db'}")
    with sqlite3.connect(folder / "mlflow.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "mlflow.db"
