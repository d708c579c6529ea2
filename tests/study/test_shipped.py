"""Every study file that ships is a valid plan, and its last arm trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablate.config import Questions, Trial, load_study
from ablate.model.counts import count
from ablate.study.designs import expand
from ablate.training.trial import run_trial

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
STUDIES = [path for path in STUDIES if path.name != "dvc.yaml"]
SHIPPED = {
    "smoke",
    "laptop",
    "asymmetry",
    "placement",
    "init",
    "shape_active",
    "shape_total",
    "routing",
    "optimizer",
    "mechanism",
    "search",
    "search_active",
    "search_facts",
    "search_facts_active",
    "teacher",
    "digits",
    "confirm",
    "controls",
    "backward",
    "prune",
    "restored",
    "equal_active",
    "capacity",
    "capacity_confirm",
    "capacity_residual",
}


def test_the_promised_studies_ship() -> None:
    assert {path.stem for path in STUDIES} >= SHIPPED


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_a_shipped_study_is_a_valid_plan(path: Path) -> None:
    study = load_study(path)
    plan = expand(study)
    assert study.name == path.stem
    assert study.title
    assert plan.total >= (1 if study.name == "capacity_keys" else 3)  # one model, for its vectors
    for trial in plan.trials[: len(plan.arms)]:
        assert count(trial.trial, 2048).total_params > 0


def _last(path: Path) -> Trial:
    study = load_study(path)
    arms = [arm for arm in expand(study).arms if arm.kind == "arm"]
    return study.trial(dict(arms[-1].changes)) if arms else study.trial({})


@pytest.mark.soak
@pytest.mark.soak_short
@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_last_arm_of_a_shipped_study_trains(
    path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trial = _last(path)
    small = {"steps": 2, "batch_size": 2, "eval_every": 2, "eval_tokens": 64 * trial.tree.leaves, "checkpoint_every": 2}
    few = {"max_documents": 40, "vocab_size": 300} if trial.task.kind == "language" else {}
    data = tmp_path_factory.getbasetemp() / "shipped-data"
    trial = trial.model_copy(
        update={
            "corpus": trial.corpus.model_copy(update=few),
            "model": trial.model.model_copy(update={"blocks": 1, "context": 64}),
            "train": trial.train.model_copy(update=small),
            "questions": Questions(),  # they need more held-out documents than forty leave
        }
    )
    result = run_trial(trial, data_root=data, folder=tmp_path)
    assert result.status == "finished"
