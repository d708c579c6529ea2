"""Runs in a real MLflow store: nothing lost, nothing doubled, states that tell the truth, also without the server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from ablate.analysis.findings import analyse
from ablate.config import ConfigError
from ablate.evaluation.scores import Evaluated, Quality
from ablate.model.transformer import Transformer
from ablate.results.layout import MODEL, Layout
from ablate.results.record import Record, load_record, save_record
from ablate.study.designs import Plan, expand
from ablate.study.records import save_plan
from ablate.study.runner import run_study
from ablate.tracking import tags
from ablate.tracking.log_report import log_evaluation, log_report
from ablate.tracking.models import log_model
from ablate.tracking.pages import VIEW_TAG
from ablate.tracking.spool import Spool, spool_path
from ablate.tracking.store import default_uri, prepare_store
from ablate.tracking.tracker import MlflowTracker
from ablate.training.checkpoint import save_model
from ablate.training.result import Evaluation
from tests.report.synthetic import write_study
from tests.study import objective
from tests.tracking.server import Server

CARD: dict[str, Any] = {"source": {"source": "stdlib"}, "data_hash": "d" * 12, "splits": {"train": {"tokens": 1}}}


def runs(uri: str) -> tuple[MlflowClient, list[Run]]:
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client, list(client.search_runs(experiments, max_results=1000))


def assert_complete(uri: str, root: Path, plan: Plan) -> None:
    """One child run a trial, each evaluation's metrics in it exactly once, and states as they are."""
    client, found = runs(uri)
    parents = [r for r in found if r.data.tags[tags.ROLE] == "study"]
    children = [r for r in found if r.data.tags[tags.ROLE] == "trial"]
    assert len(parents) == 1
    assert sorted(r.data.tags[tags.TRIAL] for r in children) == sorted(t.hash for t in plan.trials)
    layout = Layout(root, plan.study.name)
    for run in children:
        record = load_record(layout.record(run.data.tags[tags.TRIAL]))
        assert run.data.tags[tags.PARENT_RUN] == parents[0].info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.tags[tags.STATUS] == record.status
        for key in ("bpb", "n_eff_frac", "layer0/n_eff_frac"):
            logged = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tags.shown(key))]
            values = [(e.step, e.bpb if key == "bpb" else e.balance[key]) for e in record.history]
            assert sorted(logged) == values
    assert not list(spool_path(layout, "any").parent.glob("*.jsonl"))


def test_a_study_is_a_run_and_its_trials_are_children(root: Path) -> None:
    uri = default_uri(root)
    study = objective.study(seeds=[0], factors={"tree.mirror": [0, 1]}, title="A title")
    assert run_study(study, root, run=objective.descend, tracker=MlflowTracker(uri)).exit_code == 0
    plan = expand(study)
    assert_complete(uri, root, plan)
    client, found = runs(uri)
    parent = next(r for r in found if r.data.tags[tags.ROLE] == "study")
    assert (parent.info.status, parent.data.tags[tags.PLAN_HASH]) == ("FINISHED", plan.hash)
    assert parent.data.tags[tags.NOTE] == "A title"
    child = next(r for r in found if r.data.tags.get(tags.TRIAL) == plan.trials[1].hash)
    assert child.info.run_name == "mirror=1 · seed 0"
    assert child.data.params["tree.mirror"] == "1.0"
    assert child.data.params["train.betas"] == "[0.9, 0.95]"
    assert child.data.metrics["total_params"] == objective.COST.total_params
    assert [a.path for a in client.list_artifacts(child.info.run_id)] == [
        f"{plan.trials[1].hash}.usage.parquet",
        "preview",
    ]
    shown = [a.path for a in client.list_artifacts(child.info.run_id, "preview")]
    assert shown == ["preview/evaluations.html", "preview/evaluations.png"]
    experiment = client.get_experiment(child.info.experiment_id)
    assert experiment.tags[tags.EXPERIMENT_KIND] == tags.MODEL_TRAINING
    view = json.loads(experiment.tags[VIEW_TAG])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`bpb`", True)
    assert {name.strip("`").removeprefix("metrics.`") for name in view["selectedColumns"]} <= {*child.data.metrics}
    for run in (parent, child):
        assert run.data.tags[tags.SOURCE] == "ablate study run studies/cheap.yaml"
        assert run.data.tags[tags.USER]
    record = load_record(Layout(root, "cheap").record(plan.trials[1].hash))
    assert record.run_id == child.info.run_id


def test_findings_are_logged_once_to_one_run_of_the_study(root: Path) -> None:
    """Before any run of the study is tracked here, and again after: one run, files replaced."""
    uri, study = default_uri(root), objective.study(seeds=[0], factors={"tree.mirror": [0]})
    assert log_report("cheap", root, ["findings.json"]) is None  # no plan: the study was not run here
    (root / "studies").mkdir()
    (root / "studies" / "cheap.yaml").write_text(study.model_dump_json(exclude_unset=True))
    save_plan(Layout(root, "cheap"), expand(study))
    folder = Layout(root, "cheap").report
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "a.svg").write_text("<svg/>")
    (folder / "findings.json").write_text("1")
    run = log_report("cheap", root, ["findings.json", "figures", "index.html"])
    assert run is not None
    (folder / "findings.json").write_text("2")
    assert run is not None
    assert log_report("cheap", root, ["findings.json", "figures", "index.html"]) == run
    assert run_study(study, root, run=objective.descend, tracker=MlflowTracker(uri)).exit_code == 0
    client, found = runs(uri)
    [parent] = [r for r in found if r.data.tags[tags.ROLE] == "study"]
    assert (parent.info.run_id, parent.info.status, parent.data.params["name"]) == (run, "FINISHED", "cheap")
    assert [a.path for a in client.list_artifacts(run, "report")] == ["report/figures", "report/findings.json"]
    assert Path(client.download_artifacts(run, "report/findings.json", str(root))).read_text() == "2"
    with pytest.raises(ConfigError, match="no MLflow answers there"):
        log_report("cheap", root, ["findings.json"], tracking="http://127.0.0.1:9")


def test_the_studys_run_carries_what_its_findings_come_to(tmp_path: Path) -> None:
    write_study(tmp_path, factors={"tree.mirror": [0.0, 1.0]}, controls=False, tune=False, usage=0, diverged=False)
    findings = json.loads(analyse("demo", tmp_path).read_text())
    for _ in range(2):
        run = log_report("demo", tmp_path, ["findings.json"])
    assert run is not None
    logged = MlflowClient(default_uri(tmp_path)).get_run(run)
    assert logged.data.metrics["best_bpb"] == findings["summary"]["best_bpb"]
    assert logged.data.tags["ablate.best_bpb_arm"] == findings["summary"]["best_bpb_arm"]
    reference = next(a for a in findings["arms"] if a["reference"])
    assert logged.data.metrics["reference_n_eff_frac"] == reference["n_eff_frac"]["mean"]
    verdicts = [f["verdict"] for f in findings["findings"]]
    assert logged.data.metrics["inconclusive"] == verdicts.count("inconclusive")
    place = f"#/experiments/{logged.info.experiment_id}/runs/{run}/artifacts/report/index.html"
    assert logged.data.tags[tags.NOTE].count(place) == 1


def test_kept_weights_are_a_model_that_mlflow_loads(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    import mlflow.pytorch
    import torch

    study = objective.study(seeds=[0], factors={"tree.mirror": [0]}, base={"train": {"keep_checkpoint": True}})
    plan, layout = expand(study), Layout(root, "cheap")
    save_plan(layout, plan)
    tracker, planned = MlflowTracker(default_uri(root)), plan.trials[0]
    tracker.start_study(plan, layout, CARD)
    model = Transformer(planned.trial, 257).eval()
    layout.folder(planned.hash).mkdir(parents=True)
    save_model(layout.folder(planned.hash) / MODEL, model, planned.trial, "t" * 12)
    trial = tracker.open_trial(planned, layout)
    trial.finish(ended(plan, [0, 5]).model_copy(update={"status": "finished"}), [])
    settle()
    client, found = runs(default_uri(root))
    run = client.get_run(next(r for r in found if r.data.tags[tags.ROLE] == "trial").info.run_id)
    assert run.outputs is not None
    [logged] = run.outputs.model_outputs
    log_model(client, run.info.run_id, layout.folder(planned.hash) / MODEL)
    again = client.get_run(run.info.run_id).outputs
    assert again is not None
    assert again.model_outputs == [logged], "sent again, it is not logged twice"
    place = f"{run.info.artifact_uri}/model"
    loaded = mlflow.pytorch.load_model(place)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids), model(ids))
    described = mlflow.models.Model.load(place.removeprefix("file://")).get_model_info()
    assert described.signature.inputs.inputs[0].shape == (-1, -1)
    assert described.saved_input_example_info is not None
    assert client.get_logged_model(logged.model_id).source_run_id == run.info.run_id
    assert not [r for r in caplog.records if "ickle" in r.getMessage()]


def test_an_evaluation_is_logged_to_the_trials_run_beside_its_own_metrics(root: Path) -> None:
    uri, study = default_uri(root), objective.study(seeds=[0], factors={"tree.mirror": [0]})
    assert run_study(study, root, run=objective.descend, tracker=MlflowTracker(uri)).exit_code == 0
    [trial] = [t.hash for t in expand(study).trials]
    quality = Quality(corpus="other", data_hash="d" * 12, bpb=2.5, error=float("inf"), tokens=9, bytes=9)
    found = Evaluated(trial=trial, tokenizer_hash="e" * 12, quality=[quality], scores=[])
    (root / "evaluation.json").write_text(found.model_dump_json())
    [run] = log_evaluation(found, [root / "evaluation.json"], root)
    client, _ = runs(uri)
    logged = client.get_run(run).data
    assert logged.tags[tags.TRIAL] == trial
    assert logged.metrics["evaluation/bpb/other"] == 2.5
    assert "evaluation/bpb/other/error" not in logged.metrics, "an error that is not finite is not a number to plot"
    assert [a.path for a in client.list_artifacts(run, "evaluation")] == ["evaluation/evaluation.json"]
    assert_complete(uri, root, expand(study))
    assert log_evaluation(found.model_copy(update={"trial": "f" * 12}), [], root) == []
    with pytest.raises(ConfigError, match="no MLflow answers there"):
        log_evaluation(found, [], root, tracking="http://127.0.0.1:9")


def evaluation(step: int) -> Evaluation:
    balance = {"n_eff_frac": 0.5 + step / 100, "layer0/n_eff_frac": 0.5 + step / 100}
    return Evaluation(step=step, tokens=step, bpb=4.0 - step, train_loss=None, lr=0.1, seconds=1.0, balance=balance)


def started(root: Path, uri: str) -> tuple[MlflowTracker, Plan, Layout]:
    plan, layout = expand(objective.study(seeds=[0], factors={"tree.mirror": [0]})), Layout(root, "cheap")
    save_plan(layout, plan)
    tracker = MlflowTracker(uri)
    tracker.start_study(plan, layout, CARD)
    return tracker, plan, layout


def ended(plan: Plan, steps: list[int]) -> Record:
    planned = plan.trials[0]
    return Record(
        config=planned.trial,
        status="diverged",
        history=[evaluation(step) for step in steps],
        cost=objective.COST,
        provenance=objective.PROVENANCE,
        tokens_per_second=1.0,
        seconds=1.0,
        message="the loss was not finite",
        study="cheap",
        space=plan.space,
        trial=planned.hash,
        arm=planned.arm,
        kind=planned.kind,
        seed=0,
        factors={},
        run_id=None,
        leaves={},
    )


def settle() -> None:
    """Wait for the sending threads."""
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_a_resumed_trial_goes_on_in_its_run_without_doubled_metrics(root: Path) -> None:
    uri = default_uri(root)
    tracker, plan, layout = started(root, uri)
    first = tracker.open_trial(plan.trials[0], layout)
    for step in (0, 5, 10):
        first.evaluated(evaluation(step))
    first.abandon("killed", "stopped when asked")
    settle()
    client, found = runs(uri)
    child = next(r for r in found if r.data.tags[tags.ROLE] == "trial")
    assert (child.info.status, child.data.tags[tags.STATUS]) == ("KILLED", "killed")
    again = tracker.open_trial(plan.trials[0], layout)  # from its checkpoint at step 5: step 10 comes a second time
    for step in (10, 15):
        again.evaluated(evaluation(step))
    again.finish(ended(plan, [0, 5, 10, 15]), [])
    settle()
    client, found = runs(uri)
    assert len(found) == 2
    assert sorted(m.step for m in client.get_metric_history(child.info.run_id, "bpb")) == [0, 5, 10, 15]
    run = client.get_run(child.info.run_id)
    assert (run.info.status, run.data.tags[tags.STATUS]) == ("FINISHED", "diverged")
    assert run.inputs is not None
    assert run.inputs.dataset_inputs[0].dataset.digest == CARD["data_hash"]
    assert not spool_path(layout, plan.trials[0].hash).exists()


def test_a_killed_process_leaves_nothing_unsent_that_the_next_run_does_not_send(root: Path) -> None:
    """The spool and a record are there, the run is not: as after a SIGKILL, or a time without a server."""
    uri = default_uri(root)
    tracker, plan, layout = started(root, uri)
    spool = Spool(spool_path(layout, plan.trials[0].hash))
    spool.append(tracker._opening(plan.trials[0], layout))
    with spool.path.open("a") as file:
        file.write('{"event": "metrics", "ti')  # cut short
    save_record(layout, ended(plan, [0, 5]), root / "nothing")
    tracker.end_study(plan, layout, "finished")
    client, found = runs(uri)
    child = next(r for r in found if r.data.tags[tags.ROLE] == "trial")
    assert child.info.status == "FINISHED"
    assert sorted((m.step, m.value) for m in client.get_metric_history(child.info.run_id, "bpb")) == [
        (0, 4.0),
        (5, -1.0),
    ]
    assert not spool.path.exists()


def test_a_run_made_but_not_noted_is_found_again(root: Path) -> None:
    uri = default_uri(root)
    tracker, plan, layout = started(root, uri)
    spool = Spool(spool_path(layout, plan.trials[0].hash))
    opening = tracker._opening(plan.trials[0], layout)
    spool.append(opening)
    client = MlflowClient(uri)
    made = client.create_run(opening["experiment"], start_time=opening["time"], tags=opening["tags"])
    trial = tracker.open_trial(plan.trials[0], layout)
    trial.evaluated(evaluation(0))
    trial.abandon("failed", "x")
    settle()
    assert trial.run_id == made.info.run_id
    assert client.get_run(made.info.run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("sqlite:///relative.db", "an absolute path is expected"),
        ("ftp://somewhere", "is expected"),
        ("http://127.0.0.1:9", "no MLflow answers there"),
    ],
    ids=["relative", "scheme", "nobody-there"],
)
def test_unusable_stores_are_refused_before_anything_runs(tmp_path: Path, uri: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        run_study(objective.study(), tmp_path, run=objective.descend, tracker=MlflowTracker(uri))
    assert uri in str(error.value)
    assert not Layout(tmp_path, "cheap").done()


def test_a_database_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, and long enough to look at " * 50)
    with pytest.raises(ConfigError, match="the database cannot be used"):
        prepare_store(f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    made = Server(root)
    made.start()
    yield made
    made.kill()


@pytest.mark.soak
def test_a_server_that_vanishes_costs_no_metric(root: Path, server: Server) -> None:
    study = objective.study(seeds=[0])
    tracker = MlflowTracker(server.uri)
    command = [sys.executable, "-m", "tests.study.run", str(root), "2", "slow", json.dumps({"seeds": [0]}), server.uri]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    layout = Layout(root, "cheap")
    while len(layout.done()) < 1:
        assert process.poll() is None
        time.sleep(0.05)
    server.kill()
    assert process.wait(timeout=300) == 0, "training goes on without the server"
    assert len(layout.done()) == 4
    server.start()
    assert run_study(study, root, run=objective.slow, tracker=tracker).exit_code == 0
    assert_complete(server.uri, root, expand(study))
