"""A project whose MLflow store is ready: MLflow takes seconds to make one, so that it is made once and copied."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from ablate.tracking.mlflow import prepare_store


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    prepare_store(f"sqlite:///{folder / 'mlflow.db'}")
    with sqlite3.connect(folder / "mlflow.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, fresh_store: Path) -> Path:
    (tmp_path / "state").mkdir()
    shutil.copyfile(fresh_store, tmp_path / "state" / "mlflow.db")
    return tmp_path
