"""Real trials under a study's care: tracked, at what cost, and reproduced from their log."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import polars as pl
import pytest
import torch
from mlflow.tracking import MlflowClient

from ablate.config import ConfigError, Study, load_study, parse
from ablate.results.collect import collect
from ablate.results.kept import pack
from ablate.results.layout import Layout
from ablate.results.record import Record, load_record
from ablate.study.designs import expand
from ablate.study.forecast import forecast
from ablate.study.outcome import Outcome
from ablate.study.records import save_plan
from ablate.study.runner import run_study
from ablate.tracking import tags
from ablate.tracking.logged import logged
from ablate.tracking.reproduce import reproduce
from ablate.tracking.store import default_uri
from ablate.tracking.tracker import MlflowTracker, MlflowTrial
from ablate.training.checkpoint import load_model
from ablate.training.result import Evaluation
from ablate.training.runs import find_checkpoint, is_own
from ablate.training.trial import run_trial

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
    weights = project / "state/trials" / record.trial / "model.pt"
    assert not weights.exists()
    again = reproduce(record.trial[:8], project, keep=True)
    assert again.trial == record.trial
    assert sorted(again.before) == [0, 4, 8]
    assert again.equal, again
    assert again.weights == weights
    trial, origin, before = logged(record.run_id, project, None)
    assert (trial, before) == (record.config, again.before), "another machine has only what MLflow knows"
    assert origin[tags.VERSIONS] == json.dumps(record.provenance.versions, sort_keys=True)
    assert is_own(find_checkpoint(record.trial, project), load_model(weights)[1], project)
    assert set(again.changed) <= {tags.GIT_COMMIT, tags.GIT_DIRTY}, "the same machine, data and threads"


def test_a_published_trial_is_reproduced_in_a_clone_without_mlflow(project: Path, tmp_path: Path) -> None:
    layout = Layout(project, "tiny")
    record = load_record(layout.record(sorted(layout.done())[0]))
    assert record.run_id is not None
    kept, archive = tmp_path / "kept", tmp_path / "reports/tiny/data.zip"
    shutil.copytree(collect("tiny", project), kept)
    pack(kept, archive)
    again = reproduce(record.trial, tmp_path, data_root=project / "data")
    assert again.trial == record.trial
    assert sorted(again.before) == [0, 4, 8]
    assert again.equal, again
    assert set(again.changed) <= {tags.GIT_COMMIT, tags.GIT_DIRTY}, "the same machine, data, threads and versions"
    assert not (tmp_path / "state").exists(), "nothing asked for MLflow"

    trials = pl.read_parquet(kept / "trials.parquet")
    older = trials.with_columns(versions=pl.col("versions").str.replace('"torch": "[^"]*"', '"torch": "1.0"'))
    older.write_parquet(kept / "trials.parquet")
    pack(kept, archive)
    changed = reproduce(record.run_id, tmp_path, data_root=project / "data").changed
    assert changed[f"{tags.VERSIONS}.torch"] == ("1.0", torch.__version__)

    history = pl.read_parquet(kept / "history.parquet")
    history.with_columns(pl.col("bpb") + 1e-12).write_parquet(kept / "history.parquet")
    pack(kept, archive)
    assert not reproduce(record.run_id, tmp_path, data_root=project / "data").equal
    twin = pl.read_parquet(kept / "trials.parquet").with_columns(
        run_id=pl.lit(record.run_id[:12]) + pl.col("arm"), trial=pl.lit("f") + pl.col("trial")
    )
    twin.write_parquet(kept / "trials.parquet")
    pack(kept, tmp_path / "reports/twin/data.zip")
    with pytest.raises(ConfigError, match=r"could be any of .*give more of its id"):
        reproduce(record.run_id[:8], tmp_path)
    for foreign in ("0123456789abcdef", record.run_id[:7]):
        with pytest.raises(ConfigError, match="is unknown: no result in 'results' and no published one"):
            reproduce(foreign, tmp_path)
    assert not (tmp_path / "state").exists(), "nothing asked for MLflow"
    with pytest.raises(ConfigError, match=r"is unknown: no result .* and no run at sqlite:"):
        reproduce("f" * 32, tmp_path)


def test_real_runs_carry_data_code_and_balance(project: Path) -> None:
    client = MlflowClient(default_uri(project))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    children = client.search_runs([experiment.experiment_id], f"tags.`{tags.ROLE}` = 'trial'")
    assert len(children) == 2
    for run in children:
        assert run.data.tags[tags.DATA_HASH]
        assert {
            "bpb",
            "n_eff_frac",
            "per_layer0/dead_frac",
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


class Stopwatch:
    """Passes a trial's news on to its tracker and adds up the seconds that takes."""

    def __init__(self, tracked: MlflowTrial) -> None:
        self.tracked, self.seconds = tracked, 0.0

    def evaluated(self, evaluation: Evaluation) -> bool:
        started = time.perf_counter()
        stop = self.tracked.evaluated(evaluation)
        self.seconds += time.perf_counter() - started
        return stop

    def stepped(self, step: int, total: int) -> bool:
        return False


@pytest.mark.soak
def test_tracking_costs_two_percent_of_a_nano_trial_at_most(tmp_path: Path) -> None:
    """Calls on the training thread, the sending thread's CPU time, and from the trial's end to the run's."""
    study = load_study(ROOT / "studies" / "laptop.yaml")
    plan, layout = expand(study), Layout(tmp_path, "laptop")
    save_plan(layout, plan)
    planned = next(t for t in plan.trials if t.trial.model.feedforward == "tree")
    tracker = MlflowTracker(default_uri(tmp_path))
    tracker.start_study(plan, layout, None)
    started = time.perf_counter()
    tracked = tracker.open_trial(planned, layout)
    watch = Stopwatch(tracked)
    watch.seconds += time.perf_counter() - started
    folder = layout.folder(planned.hash)
    result = run_trial(planned.trial, data_root=tmp_path / "data", folder=folder, observer=watch)
    (sender,) = [t for t in threading.enumerate() if t.name == "mlflow"]
    assert sender.ident is not None
    sending = time.clock_gettime(time.pthread_getcpuclockid(sender.ident))
    ended = time.perf_counter()
    place = {"study": "laptop", "space": plan.space, "trial": planned.hash, "arm": planned.arm, "kind": planned.kind}
    record = Record(**dict(result), **place, seed=0, factors={}, run_id=tracked.run_id, leaves={})
    tracked.finish(record, [folder / "usage.parquet"])
    sender.join()
    closing = time.perf_counter() - ended
    share = (watch.seconds + sending + closing) / result.seconds
    print(
        f"tracking: {watch.seconds:.3f} s in calls, {sending:.3f} s sending, {closing:.3f} s closing of {result.seconds:.1f} s"
    )
    assert MlflowClient(tracker.uri).get_run(str(record.run_id)).info.status == "FINISHED"
    assert share <= 0.02
