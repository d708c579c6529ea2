"""Real trials under a study's care: tracked, reproduced from their log, and killed at random with nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from ablate.config import Study, parse
from ablate.study.records import Layout, load_record
from ablate.study.runner import Outcome, run_study
from ablate.study.status import forecast
from ablate.tracking import schema
from ablate.tracking.mlflow import MlflowTracker, default_uri
from ablate.tracking.reproduce import reproduce

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
