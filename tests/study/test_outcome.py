"""A study that is finished is known to be so until something it was made of changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ablate.config import Study, parse
from ablate.results.layout import Layout
from ablate.results.record import save_record
from ablate.study.designs import expand
from ablate.study.outcome import Outcome, finished, remember
from ablate.study.records import save_plan
from tests.results.test_collect import record

SETTINGS = {"name": "done", "factors": {"tree.mirror": [0, 1]}}


def study(folder: Path, **changes: object) -> Study:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("some text\n")
    return parse(Study, {**SETTINGS, "base": {"corpus": {"source": "files", "path": str(text)}}, **changes})


@pytest.fixture
def done(tmp_path: Path) -> Path:
    layout, plan = Layout(tmp_path, "done"), expand(study(tmp_path))
    save_plan(layout, plan)
    save_record(layout, record(plan, 0, tmp_path / "usage.parquet"), tmp_path)
    remember(study(tmp_path), tmp_path, [None, None], Outcome(1, 1))
    return tmp_path


def test_nothing_changed(done: Path) -> None:
    assert finished(study(done), done, [None, None]) == Outcome(1, 1)


def test_what_changed_is_looked_at_closely(done: Path) -> None:
    layout = Layout(done, "done")
    [trial] = layout.done()
    assert finished(study(done, seeds=[0]), done, [None, None]) is None
    assert finished(study(done), done, ["sqlite:///elsewhere.db", None]) is None
    spool = layout.state / f"spool/done/{trial}.jsonl"
    spool.parent.mkdir(parents=True)
    spool.touch()
    assert finished(study(done), done, [None, None]) is None, "a run waits to be sent to MLflow"
    spool.unlink()
    assert finished(study(done), done, [None, None]) is not None
    (done / "text.txt").write_text("other text\n")
    assert finished(study(done), done, [None, None]) is None
    (done / "text.txt").write_text("some text\n")
    layout.record(trial).unlink()
    assert finished(study(done), done, [None, None]) is None


def test_only_a_complete_run_is_remembered(tmp_path: Path) -> None:
    remember(study(tmp_path), tmp_path, [], Outcome(1, 2, failed=["one"]))
    assert not Layout(tmp_path, "done").finished.exists()
    Layout(tmp_path, "done").finished.parent.mkdir(parents=True)
    Layout(tmp_path, "done").finished.write_text("half")
    assert finished(study(tmp_path), tmp_path, []) is None


def test_the_answer_needs_neither_torch_nor_a_database() -> None:
    heavy = "torch", "mlflow", "optuna", "scipy", "sqlalchemy"
    code = f"import sys, ablate.study.outcome, ablate.data.tokens; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
