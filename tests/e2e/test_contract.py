"""Every kind of study that a file may ask for goes from its plan to its report, killed on the way.

Design x match x objectives x tune: planned, run by two workers, killed in the middle, run on, collected, analysed and
reported. The trials are cheap ones; commands, databases, processes and pipeline are the real ones.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml

from ablate.analysis.search.promote import promote
from ablate.config import ConfigError, Study, load_study, parse
from ablate.config.endpoints import ENDPOINTS, TASK_ENDPOINTS
from ablate.data.tokens import prepare
from ablate.results.layout import Layout
from ablate.results.record import Record, load_record
from ablate.study.address import default_storage
from ablate.study.designs import expand
from ablate.study.forecast import forecast
from ablate.study.status import status
from tests.e2e.test_pipeline import ENVIRONMENT, ROOT, dvc, make_project

Settings = dict[str, Any]

BASE = {
    "corpus": {"max_documents": 40, "vocab_size": 300},
    "model": {"d_model": 16, "blocks": 1, "heads": 2, "context": 32},
    "tree": {"trees": 4, "depth": 3, "leaf_width": 1},
    "train": {"steps": 10, "batch_size": 4, "eval_every": 5, "eval_tokens": 1024, "checkpoint_every": 2},
}
GRID = {"tree.depth": [2, 3], "tree.mirror": [0, 1]}
DESIGNS: dict[str, Settings] = {
    "factorial": {"factors": GRID},
    "one_at_a_time": {"factors": GRID},
    "confirm": {"factors": {}, "arms": {"shallow": {"tree.depth": 2}, "even": {"tree.mirror": 1}}},
    "search": {
        "factors": {
            "tree.depth": [2, 3],
            "tree.mirror": {"range": {"low": -1, "high": 1}},
            "train.lr": {"range": {"low": 0.001, "high": 1, "log": True}},
        },
        "budget": {
            "trials": 13
        },  # nine of them race: an odd number, so that the budget cuts a candidate of two seeds off
        "finalists": {"count": 2, "seeds": [7, 8]},
    },
}
MATCHES = ["none", "total_units", "active_units"]
# Lower is better, higher is better, both at once, all there are.
OF_OTHER_TASKS = {one.name for task, own in TASK_ENDPOINTS.items() if task != "language" for one in own}
OBJECTIVES = [
    ["bpb"],
    ["n_eff_frac"],
    ["bpb", "n_eff_frac"],
    [name for name in ENDPOINTS if name not in OF_OTHER_TASKS],
]
TUNES: list[Settings | None] = [None, {"lr": [0.01, 0.1], "seeds": [50]}, {"rule": "bracket", "seeds": [50, 51, 52]}]


def settings_of(design: str, match: str, objectives: list[str], tune: Settings | None) -> Settings:
    """Return the study file of one combination."""
    known = {**DESIGNS[design]}
    if design == "confirm":
        known["contrasts"] = [
            {"arm": arm, "endpoint": name, "claim": ENDPOINTS[name].better, "margin": 0.05}
            for arm in known["arms"]
            for name in objectives
        ]
    return {
        "name": "mine",
        "title": "Every kind of study",
        "design": design,
        "base": BASE,
        "seeds": [0, 1],
        "match": match,
        "objectives": objectives,
        **({"tune": tune} if tune else {}),
        **known,
    }


def admitted(settings: Settings) -> bool:
    try:
        expand(parse(Study, settings))
    except ConfigError:
        return False
    return True


EVERY = [
    settings
    for combination in itertools.product(DESIGNS, MATCHES, OBJECTIVES, TUNES)
    if admitted(settings := settings_of(*combination))
]


def name_of(settings: Settings) -> str:
    tune = settings.get("tune")
    tuned = [] if tune is None else [tune.get("rule", "grid")]
    return "-".join([settings["design"], settings["match"], "+".join(settings["objectives"]), *tuned])


FAST = ["search-total_units-bpb+n_eff_frac"]
SHORT = [
    "search-active_units-bpb",
    "search-none-n_eff_frac",
    "factorial-total_units-bpb-grid",
    "one_at_a_time-active_units-n_eff_frac-bracket",
    "confirm-none-bpb+n_eff_frac+dead_frac+bits_lost-grid",
]


def _case(settings: Settings) -> Any:
    name = name_of(settings)
    marks = [] if name in FAST else [pytest.mark.soak]
    return pytest.param(settings, id=name, marks=[*marks, *([pytest.mark.soak_short] if name in SHORT else [])])


def test_the_schema_admits_all_but_tuned_searches() -> None:
    assert len(EVERY) == (3 * len(TUNES) + 1) * len(MATCHES) * len(OBJECTIVES)
    assert {*FAST, *SHORT} <= {name_of(s) for s in EVERY}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "data"
    prepare(parse(Study, EVERY[0]).trial({}).corpus, folder)
    return folder


@pytest.mark.parametrize("settings", [_case(s) for s in EVERY])
def test_a_study_goes_from_plan_to_report(settings: Settings, tmp_path: Path, corpus: Path, fresh_store: Path) -> None:
    root = make_project(tmp_path / "project", {"mine": yaml.safe_dump(settings)}, git=False)
    (root / "data").symlink_to(corpus)
    (root / "state").mkdir()
    shutil.copyfile(fresh_store, root / "state" / "mlflow.db")
    study = load_study(root / "studies/mine.yaml")
    least = expand(study).total  # a bracket may come to more
    if settings["objectives"] == OBJECTIVES[0]:  # they do not change what a study costs
        assert forecast(study, root).trials >= least

    before = killed_in_the_middle(root, settings, least)
    after = run(root, settings)
    assert 0 < len(before) < len(after)
    assert {name: after[name] for name in before} == before, "what was done is kept as it was"
    check_trials(root, study, after)
    assert status("mine", root).done == len(after) >= least

    dvc(root, "repro")
    assert "Data and pipelines are up to date." in dvc(root, "repro")
    assert records(root) == after, "nothing ran again"
    check_report(root, study, after)
    if study.design == "search" and settings["objectives"] == OBJECTIVES[0]:
        check_larger_budget(root, settings, after)


def start(root: Path, settings: Settings) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.study.run", str(root), "2", "whole", json.dumps(settings)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(root: Path, settings: Settings) -> dict[str, Record]:
    process = start(root, settings)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return records(root)


def killed_in_the_middle(root: Path, settings: Settings, total: int) -> dict[str, Record]:
    """Run a study until some of its trials are done, and SIGKILL all of its processes; returns what was done."""
    layout = Layout(root, "mine")
    wanted = random.Random(name_of(settings)).randint(1, total // 2)
    process = start(root, settings)
    end = time.monotonic() + 120
    while len(layout.done()) < wanted:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "no trial was finished"
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    psutil.wait_procs(children, timeout=10)
    return records(root)


def records(root: Path) -> dict[str, Record]:
    layout = Layout(root, "mine")
    return {name: load_record(layout.record(name)) for name in sorted(layout.done())}


def check_trials(root: Path, study: Study, found: dict[str, Record]) -> None:
    """Every planned trial is there once, in the results and in Optuna's database."""
    plan = json.loads((root / "results/mine/plan.json").read_text())
    url = default_storage(root)
    stored = {name: optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url)}
    kept = [trial for one in stored.values() for trial in one.trials if trial.state.name != "FAIL"]
    for one in stored.values():
        assert one.metric_names == study.objectives
    assert not any(trial.state.name == "RUNNING" for trial in kept)
    places = [(r.arm, r.seed, r.kind, r.config.train.lr) for r in found.values()]
    assert len(set(places)) == len(places) == (study.budget.trials or len(plan["trials"]))
    waiting = [trial for trial in kept if trial.state.name == "WAITING"]
    if study.design != "search":
        assert not waiting
        assert (
            sorted(found) == sorted(t["trial"] for t in plan["trials"]) == sorted(t.user_attrs["trial"] for t in kept)
        )
        return
    finals = [name for name, record in found.items() if record.kind == "finalist"]
    assert sorted(finals) == sorted(t["trial"] for t in plan["trials"])
    assert len(finals) == study.finalists.count * len(study.finalist_seeds)
    runs = [[t.user_attrs["trial"]] if "trial" in t.user_attrs else t.user_attrs["runs"].values() for t in kept]
    assert sorted(itertools.chain(*runs)) == sorted(found)
    check_waiting(root, study, found, [trial.user_attrs["arm"] for trial in waiting])


def raced(found: dict[str, Record]) -> dict[str, set[int]]:
    """Seeds that each candidate of a search has raced on."""
    seeds: dict[str, set[int]] = {}
    for record in found.values():
        if record.kind == "search":
            seeds.setdefault(record.arm, set()).add(record.seed)
    return seeds


def check_waiting(root: Path, study: Study, found: dict[str, Record], waiting: list[str]) -> None:
    """Exactly those candidates wait that the budget cut off: fewer than all seeds, and none of their runs went wrong."""
    wrong = {r.arm for r in found.values() if r.status != "finished"}
    cut = [arm for arm, seeds in raced(found).items() if seeds != set(study.seeds) and arm not in wrong]
    assert sorted(waiting) == sorted(status("mine", root).waiting) == sorted(cut)
    assert len(cut) <= 2, "one a worker at most"
    assert cut or wrong, "an odd number of runs leaves one candidate with one seed"


def check_larger_budget(root: Path, settings: Settings, before: dict[str, Record]) -> None:
    """A larger budget goes on with the candidates that wait, before any new one, and keeps all that was done."""
    waiting = status("mine", root).waiting
    budget = {"trials": settings["budget"]["trials"] + len(waiting)}
    after = run(root, {**settings, "budget": budget})
    assert {name: after[name] for name in before} == before
    seeds = raced(after)
    assert {arm: seeds[arm] for arm in waiting} == {arm: set(settings["seeds"]) for arm in waiting}
    assert set(seeds) == set(raced(before)), "no new candidate before those that wait"
    assert status("mine", root).waiting == []


def check_report(root: Path, study: Study, found: dict[str, Record]) -> None:
    """Findings and report speak of all arms, and a search's finalists become a study that can be planned."""
    findings = json.loads((root / "out/mine/findings.json").read_text())
    assert findings["study"] == "mine"
    metrics = json.loads((root / "out/mine/metrics.json").read_text())
    assert metrics["trials"] == len(found)
    report = (root / "out/mine/report.md").read_text()
    assert study.title in report
    finals = {record.arm for record in found.values() if record.kind == "finalist"}
    for arm in finals or {record.arm for record in found.values()}:
        assert arm in report
    if finals:
        made = load_study(promote("mine", root, 2))
        assert set(made.arms) == finals
        assert expand(made).total == 3 * 10
