"""The newcomer's pipeline as a whole: real DVC, real Optuna and MLflow databases, real training, a real browser."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from mlflow.tracking import MlflowClient
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from ablate.cli.commands import app
from ablate.config import ConfigError, Trial, load_study
from ablate.tasks.facts import read_keys
from tests.browser import chromium
from tests.test_pasted import commands

ROOT = Path(__file__).parents[2]
TINY = """
title: A tiny study
design: factorial
base:
  corpus: {max_documents: 40, vocab_size: 300}
  model: {d_model: 16, blocks: 1, heads: 2, context: 32}
  tree: {trees: 1, depth: 2, leaf_width: 1}
  train: {steps: 8, batch_size: 4, eval_every: 4, eval_tokens: 1024, checkpoint_every: 2, keep_checkpoint: true}
factors: {tree.mirror: [0, 1]}
seeds: [0]
"""
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "DVC_NO_ANALYTICS": "true",
    "OPTUNA_STORAGE": "",
    "MLFLOW_TRACKING_URI": "",
}
for name in ("OPTUNA_STORAGE", "MLFLOW_TRACKING_URI"):
    ENVIRONMENT.pop(name)


def make_project(folder: Path, studies: dict[str, str], *, git: bool) -> Path:
    """A checkout's pipeline with studies of its own."""
    folder.mkdir(parents=True)
    (folder / "ablate").symlink_to(ROOT / "ablate")
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "studies").mkdir()
    for name, text in studies.items():
        (folder / "studies" / f"{name}.yaml").write_text(text)
    (folder / "params.yaml").write_text(json.dumps({"studies": list(studies)}))
    if git:
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["dvc", "init", "-q", *([] if git else ["--no-scm"])], cwd=folder, check=True, env=ENVIRONMENT)
    shutil.copytree(ROOT / ".dvc" / "plots", folder / ".dvc" / "plots")
    settings = configparser.ConfigParser()
    settings.read([folder / ".dvc" / "config", ROOT / ".dvc" / "config"])
    with (folder / ".dvc" / "config").open("w") as config:
        settings.write(config)
    return folder


def dvc(folder: Path, *arguments: str, **settings: str) -> str:
    environment = {**ENVIRONMENT, **settings}
    done = subprocess.run(["dvc", *arguments], cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trials(folder: Path, name: str = "tiny") -> pl.DataFrame:
    changing = ["run_id", "seconds", "tokens_per_second"]
    return pl.read_parquet(folder / "tables" / name / "trials.parquet").drop(changing)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("whole") / "project", {"tiny": TINY}, git=True)
    dvc(folder, "repro", ABLATE_WORKERS="1")  # two trials of a second each: a second worker takes ten to start
    return folder


def ablate(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["ablate", *arguments], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_one_command_gives_runs_tables_findings_and_a_report(project: Path) -> None:
    table = trials(project)
    assert table["status"].to_list() == ["finished"] * 2
    assert table["bpb"].is_between(3, 9).all()
    findings = json.loads((project / "out/tiny/findings.json").read_text())
    assert {f["verdict"] for f in findings["findings"]} <= {"supported", "refuted", "inconclusive"}
    report = (project / "out/tiny/report.md").read_text()
    pictures = list((project / "out/tiny/figures").glob("*.png"))
    assert pictures
    assert all(p.stat().st_size > 5000 for p in pictures)
    assert "A tiny study" in report
    assert "A tiny study" in (project / "out/tiny/index.html").read_text()


def test_nothing_changed_means_nothing_runs(project: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (project / "results").rglob("*.json")}
    assert "Data and pipelines are up to date." in dvc(project, "repro")
    assert before == {p: p.stat().st_mtime_ns for p in (project / "results").rglob("*.json")}


def test_flips_of_a_real_study_are_seen(project: Path) -> None:
    history = pl.read_parquet(project / "tables/tiny/history.parquet")
    trees = pl.read_parquet(project / "tables/tiny/trees.parquet")
    assert history["step"].to_list() == [0, 4, 8] * 2
    first, later = history.filter(pl.col("step") == 0), history.filter(pl.col("step") > 0)
    assert first["flip_rate"].null_count() == 2
    assert later["flip_rate"].is_between(0, 1).all()
    assert (later["flip_rate"] > 0).any()
    assert history.filter(pl.col("step") == 8)["saturation"].to_list() == pytest.approx([1, 1])
    assert (first["saturation"] < 1).all()
    one = trees.filter((pl.col("trial") == history["trial"][1]) & (pl.col("step") == 4))
    assert history["flip_rate"][1] == pytest.approx(float(one["flip_rate"].cast(pl.Float64).mean()))  # type: ignore[arg-type]
    assert history["flip_rate_worst"][1] == pytest.approx(one["flip_rate"].max())
    settled = pl.read_csv(project / "out/tiny/tables/settled.csv")
    assert settled["flip_rate"].null_count() == 0
    assert (project / "out/tiny/figures/flips.png").exists()


def test_metrics_and_plots_are_dvcs(project: Path) -> None:
    [metrics] = json.loads(dvc(project, "metrics", "show", "--json")).values()
    assert metrics["data"]["out/tiny/metrics.json"]["data"]["trials"] == 2
    for name, rows in (("quality", 4), ("balance", 6)):
        chart = json.loads(dvc(project, "plots", "show", "--show-vega", f"out/tiny/plots/{name}.csv"))
        assert chart["title"]["text"].startswith("tiny: ")
        assert len(chart["data"]["values"]) == rows
    # One seed makes no comparison, and DVC draws nothing of a table without rows.
    assert json.loads(dvc(project, "plots", "show", "--show-vega", "out/tiny/plots/effects.csv")) == {}
    said = dvc(project, "plots", "show", "-o", "shown")
    assert "index.html" in said
    assert "mirror 1" in (project / "shown" / "index.html").read_text()


def test_the_report_is_logged_to_the_studys_run(project: Path) -> None:
    client = MlflowClient(f"sqlite:///{project / 'state' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id], "tags.`ablate.role` = 'study'")
    logged = {a.path for a in client.list_artifacts(run.info.run_id, "report")}
    assert logged == {f"report/{n}" for n in ("findings.json", "metrics.json", "index.html", "report.md", "figures")}
    page = client.download_artifacts(run.info.run_id, "report/index.html", str(project / "state"))
    assert Path(page).read_bytes() == (project / "out/tiny/index.html").read_bytes()


def test_the_commands_of_readme_and_report_work_on_what_was_made(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pasted as they are, but for the names of the study and the trial; questions are left out (they take minutes)."""
    copy = tmp_path / "project"
    shutil.copytree(project, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".dvc"))
    monkeypatch.chdir(copy)
    trial = pl.read_parquet("tables/tiny/trials.parquet")["trial"][0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("<trial>", trial).replace("confirm", "tiny")
    report = Path("out/tiny/report.md").read_text(encoding="utf-8")
    pages = [report, readme.replace("mine.yaml", "tiny.yaml")]
    done: set[str] = set()
    for command in {tuple(c): None for page in pages for c in commands(page, "ablate")}:
        arguments = ["tiny" if word == "mine" and command[0] != "new" else word for word in command]
        again = arguments[0] == "reproduce" and "reproduce" in done
        if len(arguments) < 2 + (arguments[0] == "study") or arguments[0] == "bench" or again:
            continue
        extra = {"evaluate": ["--tasks", ""], "prune": ["--tokens", "1024"]}.get(arguments[0], [])
        ended = CliRunner().invoke(app, [*arguments, *extra], catch_exceptions=False)
        assert ended.exit_code == 0, (arguments, ended.output)
        done.add(arguments[0])
    assert done >= {
        "new",
        "study",
        "collect",
        "analyse",
        "report",
        "inspect",
        "reproduce",
        "prune",
        "evaluate",
        "generate",
    }
    assert load_study(Path("studies/mine.yaml")).name == "mine"


def test_vectors_of_a_trained_model_become_keys_of_facts(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    trial, out = trials(project)["trial"][0], tmp_path / "keys.npy"
    arguments = ["keys", trial, "--tokens", "1024", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--count", "64"], catch_exceptions=False)
    assert (done.exit_code, np.load(out).shape) == (0, (64, 16)), done.output
    assert f"{out}: 64 vectors of width 16 from block 0" in done.output
    with pytest.raises(ConfigError, match="block is 1: the model has blocks 0 to 0"):
        CliRunner().invoke(app, [*arguments, "--block", "1"], catch_exceptions=False)
    facts = {"kind": "facts", "facts": 64, "classes": 4, "keys": "residual", "keys_file": str(out)}
    sections = {"task": facts, "model": {"d_model": 16, "heads": 1}, "tree": {"trees": 1, "depth": 2, "leaf_width": 1}}
    assert read_keys(Trial.model_validate(sections)).shape == (64, 16)


def test_pruned_trials_reach_the_report(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pl.read_parquet(project / "tables/tiny/trials.parquet")
    assert not (project / "tables/tiny/prune.parquet").exists()
    monkeypatch.chdir(project)
    for threshold in ("0", "0.4"):
        arguments = ["prune", table["trial"][0], "--threshold", threshold, "--tokens", "1024"]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
    told = json.loads(ablate(project, "prune", table["run_id"][1], "--threshold", "0.4", "--tokens", "1024", "--json"))
    assert told["results"] == [f"results/tiny/{table['trial'][1]}.prune-0.4.json"]
    assert "'collect@tiny'" in dvc(project, "repro")
    assert_frame_equal(pl.read_parquet(project / "tables/tiny/trials.parquet"), table)
    pruned = pl.read_parquet(project / "tables/tiny/prune.parquet")
    assert pruned.select("trial", "threshold", "method").rows() == [
        (trial, threshold, method)
        for trial, threshold in ((table["trial"][0], 0.0), (table["trial"][0], 0.4), (table["trial"][1], 0.4))
        for method in ("dead", "random", "magnitude")
    ]
    assert pruned["run_id"].to_list() == [table["run_id"][0]] * 6 + [table["run_id"][1]] * 3
    cut = pruned.filter((pl.col("method") == "dead") & (pl.col("trial") == table["trial"][1])).row(0, named=True)
    assert cut["removed_frac"] == 1 - told["units_after"] / told["units_before"]
    assert (cut["bpb_before"], cut["bpb_after"]) == (told["bpb_before"], told["bpb_after"])
    assert pruned["delta_bpb"].to_list() == (pruned["bpb_after"] - pruned["bpb_before"]).to_list()
    report = (project / "out/tiny/report.md").read_text()
    assert "figures/prune.png" in report
    assert table["run_id"][1][:8] in report[report.index("Prune test, means over seeds") :].split("## ")[0]
    assert "Everything agrees." in ablate(project, "doctor")


@pytest.mark.soak_short
def test_editing_one_study_runs_that_study_only(project: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (project / "results" / "tiny").glob("*.json") if p.name != "plan.json"}
    (project / "studies/other.yaml").write_text(TINY.replace("[0, 1]", "[1]"))
    (project / "params.yaml").write_text(json.dumps({"studies": ["tiny", "other"]}))
    dvc(project, "repro", "analyse@other")
    one = trials(project, "other")
    (project / "studies/other.yaml").write_text(TINY.replace("[0, 1]", "[1, 0.5]"))
    said = dvc(project, "repro", "collect@other", "collect@tiny")
    assert "Running stage 'study@other'" in said
    assert "Stage 'study@tiny' didn't change, skipping" in said
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert trials(project, "other").height == 2
    assert_frame_equal(trials(project, "other").head(1), one)
    left = json.loads(dvc(project, "status", "--json"))
    assert sorted(left) == ["analyse@other", "report@other"], "what was not asked for waits, and nothing of tiny does"


@pytest.mark.soak
@pytest.mark.soak_short
def test_killed_in_the_middle_and_repeated_gives_the_same_table(project: Path, tmp_path: Path) -> None:
    longer = (
        TINY.replace("steps: 8", "steps: 60")
        .replace("seeds: [0]", "seeds: [0, 1]")
        .replace("checkpoint_every: 2", "checkpoint_every: 10")
    )
    whole = make_project(tmp_path / "whole", {"tiny": longer}, git=False)
    killed = make_project(tmp_path / "killed", {"tiny": longer}, git=False)
    for folder in (whole, killed):
        (folder / "data").symlink_to(project / "data")
    dvc(whole, "repro", "collect@tiny")
    running = subprocess.Popen(
        ["dvc", "repro", "collect@tiny"], cwd=killed, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((killed / "state" / "trials").glob("*/last.ckpt")) and time.monotonic() < deadline:
        assert running.poll() is None, "the study ended before it could be killed"
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before = {p.name for p in (killed / "results" / "tiny").glob("*.json")} - {"plan.json"}
    assert len(before) < 4
    dvc(killed, "repro", "collect@tiny")
    assert_frame_equal(trials(killed), trials(whole))


@pytest.mark.browser
def test_mlflow_ui_shows_the_study_its_trials_and_their_metrics(project: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ["ablate", "ui", "--port", str(port)], cwd=project, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith(f"MLflow at http://127.0.0.1:{port} ")
        address = next(
            line.split()[-1] for line in iter(server.stdout.readline, "") if line.strip().startswith("tiny:")
        )
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) == 0, "the address is printed once it answers"
        table = pl.read_parquet(project / "tables/tiny/trials.parquet")
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1500, "height": 900})
            page.goto(address, timeout=90_000)
            page.get_by_role("link", name="tiny").nth(1).wait_for(timeout=90_000)
            page.get_by_role("link", name="mirror=1").first.wait_for(timeout=90_000)  # trials are not folded away
            for column in ("bpb", "bits_lost", "n_eff_frac", "dead_frac"):
                page.locator("[role=columnheader]").get_by_text(column, exact=True).wait_for(state="attached")
            page.screenshot(path=tmp_path / "runs.png")
            assert page.get_by_role("link", name="mirror=0").count() == 1
            page.get_by_role("link", name="mirror=1").first.click()
            row = table.row(by_predicate=pl.col("arm") == "mirror=1", named=True)
            page.get_by_text(row["run_id"]).first.wait_for(timeout=90_000)
            for text in ("n_eff_frac", "per_layer0/n_eff_frac", "dead_frac", "bpb"):
                page.get_by_text(text, exact=True).first.wait_for(timeout=90_000, state="attached")
            page.get_by_text(str(row["bpb"])[:5]).first.wait_for(timeout=90_000, state="attached")
            page.screenshot(path=tmp_path / "run.png")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
