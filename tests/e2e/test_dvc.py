"""What DVC's commands do to the files of a user: they stay, settings and metrics are listed, plots need no network."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.browser import chromium
from tests.e2e.test_pipeline import ROOT, TINY, dvc, make_project

MADE = (
    "results/{}/plan.json",
    "results/{}/0123456789ab.json",
    "tables/{}/trials.parquet",
    "out/{}/findings.json",
    "out/{}/index.html",
    "out/{}/report.md",
    "out/{}/figures/a.png",
    "out/{}/tables/a.csv",
    "out/{}/plots/quality.csv",
    "out/{}/plots/balance.csv",
    "out/{}/plots/effects.csv",
)


CURVES = {
    "quality.csv": "arm,step,quality,n\ncentred,0,8.1,2\ncentred,8,5.6,2\nsign,0,8.0,2\nsign,8,5.7,2\n",
    "balance.csv": "arm,step,n_eff_frac,n\ncentred,0,0.9,2\ncentred,8,0.8,2\nsign,0,0.9,2\nsign,8,0.5,2\n",
    "effects.csv": "comparison,endpoint,effect,low,high,verdict\n"
    "centred vs sign,bpb,-0.1,-0.3,0.1,inconclusive\ncentred vs sign,n_eff_frac,0.3,0.2,0.4,supported\n",
}


def made(study: str) -> list[str]:
    """Return the names of the files that a finished study has."""
    return [place.format(study) for place in MADE]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with two studies, both done as far as DVC knows; files hold their own names."""
    folder = make_project(tmp_path_factory.mktemp("dvc") / "project", dict.fromkeys(("mine", "other"), TINY), git=True)
    shutil.copy(ROOT / ".gitignore", folder)
    for study in ("mine", "other"):
        for name in (*made(study), f"data/cards/{study}.json", f"out/{study}/metrics.json"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"trials": 2}' if path.suffix == ".json" else CURVES.get(path.name, "step,bpb\n0,8\n"))
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    dvc(folder, "commit", "-f")
    return folder


def test_a_checkout_with_results_and_reports_is_clean_but_for_the_lock(finished: Path) -> None:
    assert git(finished, "status", "--porcelain") == "?? dvc.lock\n"


def test_an_experiment_on_another_study_removes_nothing(finished: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in made("mine") + made("other")}
    said = dvc(finished, "exp", "run", "-n", "one", "-S", "studies=[other]")
    assert "Stage 'study@other' didn't change, skipping" in said
    dvc(finished, "checkout", "--force")
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_an_experiment_lists_settings_and_metrics(finished: Path) -> None:
    rows = csv.DictReader(io.StringIO(dvc(finished, "exp", "show", "--csv")))
    [row] = [row for row in rows if row["Experiment"] == "one"]
    assert row["studies"] == "['other']"
    assert row["trials"] == "2"
    assert row["studies/other.yaml:base.train.steps"] == "8"


def test_a_dry_run_of_a_fresh_clone_lists_every_stage(finished: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(finished), "clone")
    said = dvc(tmp_path / "clone", "repro", "--dry", "--force")
    assert [f"Running stage '{stage}@mine'" in said for stage in ("prepare", "study", "collect", "analyse", "report")]
    assert "ablate report other" in said


@pytest.mark.browser
def test_plots_are_drawn_without_a_network(finished: Path, tmp_path: Path) -> None:
    dvc(finished, "plots", "show", "-o", str(tmp_path / "shown"))
    asked: list[str] = []
    errors: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "shown" / "index.html").as_uri())
        shown = page.locator("svg text").all_text_contents()
        assert page.locator("svg").count() == 3, "three charts of the study that params.yaml names now"
        assert page.locator("svg path").count() == 4
        page.screenshot(path=tmp_path / "plots.png", full_page=True)
    assert errors == []
    assert [url for url in asked if not url.startswith("file:")] == []
    assert {"other: quality over training", "optimizer step", "centred vs sign", "n_eff_frac, difference"} <= {*shown}


def test_what_python_keeps_beside_code_makes_no_stage_run_again(tmp_path: Path) -> None:
    """Commands that import more of the code than the stage did must not look like a change of it."""
    folder = make_project(tmp_path / "project", {"mine": TINY}, git=False)
    (folder / "dvc.yaml").unlink()
    (folder / "ablate").unlink()
    package = folder / "ablate" / "analysis"
    package.mkdir(parents=True)
    (package / "one.py").write_text("ONE = 1\n")
    dvc(folder, "stage", "add", "-q", "--run", "-n", "analyse", "-d", "ablate/analysis", "-O", "said", "date > said")
    cache = package / "__pycache__"
    cache.mkdir()
    (cache / "one.cpython-311.pyc").write_bytes(b"compiled")
    assert "Data and pipelines are up to date." in dvc(folder, "repro")
    (package / "two.py").write_text("TWO = 2\n")
    assert "Running stage 'analyse'" in dvc(folder, "repro")
