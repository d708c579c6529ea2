"""Real trials under a study's care: tracked, reproduced from their log, and killed at random with nothing lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from ablate.config import Study, parse
from ablate.study.designs import expand
from ablate.study.records import Layout, load_record
from ablate.study.runner import Outcome, run_study
from ablate.study.status import forecast
from ablate.tracking import schema
from ablate.tracking.doctor import doctor
from ablate.tracking.mlflow import MlflowTracker, default_uri
from ablate.tracking.reproduce import reproduce
from tests.study import objective
from tests.study.test_runner import table

ROOT = Path(__file__).parents[2]
TINY = {
    "name": "tiny",
    "base": {
        "corpus": {"max_documents": 40, "vocab_size": 300},
        "model": {"d_model": 16, "blocks": 1, "heads": 2, "context": 32},
        "tree": {"trees": 1, "depth": 2, "leaf_width": 1},
        "train": {"steps": 8, "batch_size": 4, "eval_every": 4, "eval_tokens": 1024, "checkpoint_every": 2},
    },
    "factors": {"tree.mirror": [0, 1]},
    "seeds": [0],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tracker = MlflowTracker(default_uri(root))
    assert run_study(parse(Study, TINY), root, tracker=tracker) == Outcome(2, 2)
    return root


def test_a_tracked_trial_is_reproduced_from_its_run_bit_for_bit(project: Path) -> None:
    layout = Layout(project, "tiny")
    record = load_record(layout.record(sorted(layout.done())[0]))
    assert record.run_id is not None
    again = reproduce(record.run_id, project)
    assert again.trial == record.trial
    assert sorted(again.before) == [0, 4, 8]
    assert again.equal, again
    assert set(again.changed) <= {schema.GIT_COMMIT, schema.GIT_DIRTY}, "the same machine, data and threads"


def test_real_runs_carry_data_code_and_balance(project: Path) -> None:
    client = MlflowClient(default_uri(project))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    children = client.search_runs([experiment.experiment_id], f"tags.`{schema.ROLE}` = 'trial'")
    assert len(children) == 2
    for run in children:
        assert run.data.tags[schema.DATA_HASH]
        assert {
            "bpb",
            "n_eff_frac",
            "layer0/dead_frac",
            "tokens_per_second",
            "leaves/pruned",
        } <= run.data.metrics.keys()
        assert run.inputs is not None
        dataset = run.inputs.dataset_inputs[0].dataset
        assert json.loads(dataset.profile or "")["splits"]["train"]["tokens"] > 0


def test_a_forecast_runs_nothing_that_is_kept(project: Path) -> None:
    study = parse(Study, {**TINY, "name": "later", "seeds": [0, 1]})
    told = forecast(study, project)
    assert (told.trials, told.tokens) == (4, 4 * 8 * 4 * 32)
    assert set(told.seconds_by_arm) == {"mirror=0", "mirror=1"}
    assert 0 < told.seconds < 600
    assert not Layout(project, "later").results.exists()
    assert not any((project / "state" / "probes").iterdir())


SCRIPT = """
import sys
from pathlib import Path
from ablate.study.runner import run_study
from ablate.tracking.mlflow import MlflowTracker, default_uri
from tests.study import objective
if __name__ == "__main__":
    root = Path(sys.argv[1])
    tracker = MlflowTracker(default_uri(root))
    sys.exit(run_study(objective.study(), root, run=objective.slow, workers=2, tracker=tracker).exit_code)
"""


@pytest.mark.soak
def test_thirty_random_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    """SIGKILL to a worker, to the parent, to all, and SIGTERM, at random moments, until each study is done."""
    undisturbed = tmp_path / "undisturbed"
    assert run_study(objective.study(), undisturbed, run=objective.descend) == Outcome(8, 8)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    generator = random.Random(int(os.environ.get("ABLATE_KILL_SEED", "0")))
    kills, rounds = int(os.environ.get("ABLATE_KILLS", "30")), 0
    while kills > 0:
        rounds += 1
        root = tmp_path / f"round{rounds}"
        kills -= _until_done(root, script, generator)
        assert table(root) == table(undisturbed)
        _check_runs(root)


def _until_done(root: Path, script: Path, generator: random.Random) -> int:
    """Run the study again and again until a run of it ends by itself; returns the number of kills."""
    kills = 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(40):
        process = subprocess.Popen([sys.executable, str(script), str(root)], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + generator.uniform(0, 25)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None and kills < 8:
            kills += 1
            parent = psutil.Process(process.pid)
            workers = [p for p in parent.children() if "spawn_main" in " ".join(p.cmdline())]
            whom = generator.choice(["worker", "parent", "all", "polite"])
            if whom in {"worker", "all"}:
                for worker in workers[: 1 if whom == "worker" else 2]:
                    worker.kill()
            if whom in {"parent", "all"}:
                process.kill()
            if whom == "polite":
                process.send_signal(signal.SIGTERM)
            psutil.wait_procs(workers if whom != "worker" else [], timeout=60)
        if process.wait(timeout=300) == 0:
            return kills
    raise AssertionError("the study never finished")


def _check_runs(root: Path) -> None:
    """Exactly one finished run a trial, every evaluation once, nothing RUNNING after doctor."""
    doctor(root, fix=True)
    assert doctor(root) == []
    client, layout = MlflowClient(default_uri(root)), Layout(root, "cheap")
    experiment = client.get_experiment_by_name("cheap")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {r.info.status for r in runs} == {"FINISHED"}
    children = [r for r in runs if r.data.tags[schema.ROLE] == "trial"]
    assert sorted(r.data.tags[schema.TRIAL] for r in children) == sorted(
        t.hash for t in expand(objective.study()).trials
    )
    for run in children:
        record = load_record(layout.record(run.data.tags[schema.TRIAL]))
        logged = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "bpb")]
        assert sorted(logged) == [(e.step, e.bpb) for e in record.history]
