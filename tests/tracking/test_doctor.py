"""Doctor finds every kind of disagreement, changes nothing unasked, and leaves nothing to find after `fix`."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from ablate.results.layout import Layout
from ablate.results.record import load_record
from ablate.study.address import default_storage
from ablate.study.designs import expand
from ablate.study.outcome import Outcome
from ablate.study.queue import Queue
from ablate.study.runner import run_study
from ablate.study.status import status
from ablate.study.storage import open_storage
from ablate.tracking import tags
from ablate.tracking.doctor import doctor
from ablate.tracking.store import default_uri
from ablate.tracking.tracker import MlflowTracker
from tests.study import objective

STUDY = objective.study(seeds=[0])


@pytest.fixture
def broken(root: Path) -> Path:
    """A finished study with everything wrong that crashes and curious users can cause."""
    assert run_study(STUDY, root, run=objective.descend, tracker=MlflowTracker(default_uri(root))) == Outcome(4, 4)
    layout, client = Layout(root, "cheap"), MlflowClient(default_uri(root))
    assert doctor(root) == []
    records = {t.arm: load_record(layout.record(t.hash)) for t in expand(STUDY).trials}
    stuck, damaged, untracked, lost = records.values()
    assert stuck.run_id
    assert untracked.run_id
    client.update_run(stuck.run_id, status="RUNNING")
    layout.record(damaged.trial).write_text('{"study": "che')
    client.delete_run(untracked.run_id)
    layout.record(lost.trial).unlink()
    (layout.results / ".abc.json.77.partial").write_text("{")
    layout.folder(stuck.trial).mkdir(parents=True)
    (layout.folder(stuck.trial) / "last.ckpt").write_text("x")
    queue = Queue(expand(STUDY), open_storage(default_storage(root)))
    queue.reconcile(layout.done(), lambda name: records[next(a for a in records if records[a].trial == name)], "here")
    claim = queue.claim("gone:1:1")
    assert claim is not None
    assert claim.hash == lost.trial
    (root / "dvc.lock").write_text("stages:\n  collect@cheap:\n    outs:\n    - path: tables/cheap\n")
    return root


EXPECTED = [
    "half-written file",
    "damaged result",
    "without its result",
    "checkpoints of the finished trial",
    "is RUNNING but has no worker",
    "is RUNNING but its trial has a result",
    "has no result",
    "has no run",
    "made by stage collect@cheap, is gone",
]


def test_every_disagreement_is_found_and_nothing_is_touched(broken: Path) -> None:
    before = {
        p: p.read_bytes() for p in broken.rglob("*") if p.is_file() and p.suffix in {".json", ".parquet", ".ckpt"}
    }
    found = [f.problem for f in doctor(broken)]
    for words in EXPECTED:
        assert any(words in problem for problem in found), (words, found)
    assert {p: p.read_bytes() for p in before} == before
    assert [f.problem for f in doctor(broken)] == found


def test_after_fix_there_is_nothing_left_and_the_study_completes(broken: Path) -> None:
    assert all(f.fixed for f in doctor(broken, fix=True) if "dvc" not in f.remedy)
    now = status("cheap", broken)
    assert (now.total, now.done, now.running, now.by_status) == (4, 2, False, {"finished": 2})
    assert now.best is not None
    assert [f.rpartition(": ")[2] for f in now.failures] == ["freed by ablate doctor"]
    assert [f.problem for f in doctor(broken)] == ["tables/cheap, made by stage collect@cheap, is gone"]
    uri = default_uri(broken)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("cheap")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert "RUNNING" not in {r.info.status for r in runs}
    queue = Queue(expand(STUDY), open_storage(default_storage(broken)))
    assert TrialState.RUNNING not in {t.state for t in queue.study.get_trials()}
    assert run_study(STUDY, broken, run=objective.descend, tracker=MlflowTracker(uri)) == Outcome(4, 4)
    layout = Layout(broken, "cheap")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    good = [r for r in runs if r.data.tags.get(tags.ROLE) == "trial" and r.data.tags[tags.STATUS] == "finished"]
    assert {r.data.tags[tags.TRIAL] for r in good} == layout.done()
