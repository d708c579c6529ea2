"""A project whose MLflow store is ready."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path, fresh_store: Path) -> Path:
    (tmp_path / "state").mkdir()
    shutil.copyfile(fresh_store, tmp_path / "state" / "mlflow.db")
    return tmp_path
