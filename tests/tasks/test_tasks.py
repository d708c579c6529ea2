"""Tasks beside language: what they measure is what their definition says, and a run of each repeats and resumes exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from ablate.analysis.search.promote import changed
from ablate.cli.common import corpus_in
from ablate.config import ConfigError, Study, Trial, parse
from ablate.config.endpoints import TASK_ENDPOINTS, measured_by
from ablate.model.dense import DenseFeedForward
from ablate.model.size import size
from ablate.study.designs import expand
from ablate.tasks.digits import images, split
from ablate.tasks.facts import FactsModel
from ablate.tasks.registry import open_task, tasks
from ablate.tasks.teacher import TeacherModel
from ablate.training.checkpoint import load_model
from ablate.training.result import Evaluation
from ablate.training.trial import run_trial

DRAWN = ["facts", "teacher", "digits"]
SMALL: dict[str, dict[str, Any]] = {
    "model": {"d_model": 16, "heads": 1, "blocks": 2, "context": 16},
    "tree": {"trees": 2, "depth": 2, "leaf_width": 1},
    "train": {"steps": 12, "batch_size": 32, "eval_every": 4, "eval_tokens": 512, "checkpoint_every": 3},
}


def trial(kind: str, **changes: dict[str, Any]) -> Trial:
    task = {"kind": kind} | ({"facts": 100, "classes": 8} if kind == "facts" else {})
    sections = {"task": task, **SMALL}
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section}
    return Trial.model_validate({**sections, "init_seed": 3, "data_seed": 5})


def inputs_of(kind: str, config: Trial) -> list[Tensor]:
    data = open_task(config, Path()).data(0)
    return [batch["inputs"] for batch in data.train_dataloader()]


def test_every_kind_of_task_has_a_definition_and_endpoints() -> None:
    assert tasks().keys() == TASK_ENDPOINTS.keys()
    for kind in tasks():
        assert measured_by(kind)[0] is TASK_ENDPOINTS[kind][0]


@pytest.mark.parametrize("kind", DRAWN)
def test_data_follow_from_data_seed_alone(kind: str) -> None:
    config = trial(kind)
    same = inputs_of(kind, config.model_copy(update={"init_seed": 9}))
    other = inputs_of(kind, config.model_copy(update={"data_seed": 9}))
    assert all(torch.equal(a, b) for a, b in zip(inputs_of(kind, config), same, strict=True))
    assert not torch.equal(same[0], other[0])
    later = [batch["inputs"] for batch in open_task(config, Path()).data(5).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(later, same[5:], strict=True))
    halves = config.model_copy(update={"train": config.train.model_copy(update={"accumulate": 2})})
    assert [len(i) for i in inputs_of(kind, halves)] == [16] * 24


def test_keys_have_one_length_and_the_spectrum_asked_for() -> None:
    task: dict[str, Any] = {"facts": 20_000, "keys": "correlated", "spectrum": 1.5}
    model = FactsModel(trial("facts", task=task))
    assert model.keys.norm(dim=1).numpy() == pytest.approx(4.0, rel=1e-5)
    found = np.linalg.eigvalsh(np.cov(model.keys.numpy().T))[::-1]
    assert (np.diff(np.log(found[:8])) / np.diff(np.log(np.arange(1, 9)))).mean() == pytest.approx(-1.5, abs=0.45)
    even = np.linalg.eigvalsh(np.cov(FactsModel(trial("facts", task={"facts": 20_000})).keys.numpy().T))
    assert even.max() / even.min() < 1.2


def test_bits_stored_are_what_the_cross_entropy_leaves() -> None:
    config = trial("facts", model={"feedforward": "dense"}, dense={"width": 200})
    task = open_task(config, Path())
    model = task.model()
    assert isinstance(model, FactsModel)
    assert isinstance(model.feedforward, DenseFeedForward)
    with torch.no_grad():
        model.feedforward.w_out.mul_(0.01)  # nearly even answers, so that some bits are known
        logits = model(torch.arange(100)).double().log_softmax(1)
    bits = sum(3 + logits[i, model.classes[i]].item() / math.log(2) for i in range(100))
    watched: list[Tensor] = []
    found = task.measure(model, task.data(0).val_dataloader(), watched.append)
    assert found["kbit_stored"] == pytest.approx(max(0.0, bits) / 1000, abs=1e-6)
    assert found["accuracy"] == (logits.argmax(1) == model.classes).double().mean()
    params = sum(p.numel() for p in model.parameters())
    assert found["bits_per_param"] == pytest.approx(1000 * found["kbit_stored"] / params)
    assert [len(ids) for ids in watched] == [100]


def test_the_best_linear_map_explains_none_of_the_variance_and_the_teacher_all() -> None:
    alone = trial("teacher", model={"feedforward": "none"}, train={"eval_tokens": 8192})
    task = open_task(alone, Path())
    none = task.measure(task.model(), task.data(0).val_dataloader(), lambda _: None)
    assert none["unexplained"] == pytest.approx(1, abs=1e-6)

    taught = trial("teacher", model={"feedforward": "dense"}, dense={"width": 65, "activation": "relu"})
    task = open_task(taught, Path())
    student = task.model()
    assert isinstance(student, TeacherModel)
    layer = student.feedforward
    assert isinstance(layer, DenseFeedForward)
    assert layer.b is not None
    with torch.no_grad():
        student.linear.zero_()
        layer.b.zero_()
        layer.w_in[:64], layer.w_out[:64] = student.w_in, student.w_out
        layer.w_in[64], layer.b[64] = 0, 1  # a constant: the teacher's mean
        layer.w_out[64] = -student.w_out.sum(0) / math.sqrt(2 * math.pi)
    found = task.measure(student, task.data(0).val_dataloader(), lambda _: None)
    assert found["unexplained"] == pytest.approx(0, abs=1e-9)

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((200_000, 16), dtype=np.float32))
    outputs, beyond = student.teach(x)
    best = torch.linalg.lstsq(x, outputs).solution
    assert F.mse_loss(x @ best, outputs).item() == pytest.approx(beyond.square().mean().item(), rel=2e-3)


def test_digits_are_cut_into_patches_and_a_third_is_held_out() -> None:
    patches, classes = images()
    assert (patches.shape, classes.bincount().tolist()) == ((1797, 16, 4), np.bincount(load_digits().target).tolist())
    image = np.asarray(load_digits().images[7])
    assert (patches[7, 6].numpy() * 8 + 8).tolist() == image[2:4, 4:6].flatten().tolist()
    known, held_out = split()
    assert (len(known), len(held_out)) == (1198, 599)
    assert set(known.tolist()) | set(held_out.tolist()) == set(range(1797))
    task = open_task(trial("digits"), Path())
    model = task.model()
    found = task.measure(model, task.data(0).val_dataloader(), lambda _: None)
    logits = model(held_out).detach().double().log_softmax(1)
    assert found["nats"] == pytest.approx(-logits[range(599), classes[held_out]].mean().item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == classes[held_out]).double().mean().item())
    assert task.cost().total_params == sum(p.numel() for p in model.parameters())
    named = task.labels(held_out[:2])
    assert named is not None
    assert named.tolist() == [int(classes[held_out[0]])] * 16 + [int(classes[held_out[1]])] * 16


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def evaluated(self, evaluation: Evaluation) -> bool:
        return False

    def stepped(self, step: int, total: int) -> bool:
        return step == self.step


@pytest.mark.parametrize("kind", DRAWN)
def test_a_resumed_run_equals_one_never_stopped(kind: str, tmp_path: Path) -> None:
    config = trial(kind, tree={"routing": "centred"}, train={"accumulate": 2})
    whole = run_trial(config, data_root=tmp_path, folder=tmp_path / "whole", threads=1)
    assert whole.status == "finished"
    assert (
        run_trial(config, data_root=tmp_path, folder=tmp_path / "parts", threads=1, observer=StopAt(5)).status
        == "killed"
    )
    resumed = run_trial(config, data_root=tmp_path, folder=tmp_path / "parts", threads=1)
    kept = [[e.model_dump(exclude={"seconds"}) for e in r.history] for r in (whole, resumed)]
    assert kept[0] == kept[1]
    assert [e.step for e in whole.history] == [0, 4, 8, 12]
    assert {name for e in whole.history for name in e.task} == {e.name for e in TASK_ENDPOINTS[kind]}
    assert whole.final.bpb is None
    assert whole.final.balance["n_eff_frac"] > 0
    assert whole.final.tokens == 12 * 32 * config.positions
    assert not list(tmp_path.glob("*.json")), "no corpus is prepared"


STUDY: dict[str, Any] = {"name": "s", "preset": "facts", "margin": 1, "factors": {"tree.mirror": [0, 1]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": None}, "margin is missing: task 'facts' is judged in kbit stored; say which difference"),
        ({"objectives": ["bpb"]}, "objectives is ['bpb']: task 'facts' measures kbit_stored, bits_per_param, accuracy"),
        ({"base": {"task": {"kind": "fact"}}}, "base.task.kind is 'fact': input should be 'language', 'facts'"),
        ({"base": {"task": {"teacher_width": 3}}}, "base.task: teacher_width is 3: only task 'teacher' has it, not 'facts'"),
        ({"base": {"task": {"spectrum": 2}}}, "base.task: spectrum is 2.0: it needs keys 'correlated'"),
        ({"base": {"corpus": {"vocab_size": 300}}}, "base: corpus: task 'facts' reads no text"),
        ({"preset": "digits", "base": {"model": {"context": 8}}}, "base: model.context is 8: task 'digits' reads 16 patches"),
        ({"base": {"train": {"devices": 2}}}, "base: train.devices is 2: task 'facts' trains on one"),
        ({"factors": {"task.kind": ["facts", "teacher"]}}, "factor 'task.kind' is none: trials of one study have one task"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)  # fmt: skip
def test_what_a_task_does_not_have_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(Study, {key: value for key, value in {**STUDY, **change}.items() if value is not None})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_study_is_about_its_tasks_quality() -> None:
    study = parse(Study, STUDY)
    assert (study.quality.name, study.objectives) == ("kbit_stored", ["kbit_stored"])
    contrast = {"arm": "even", "claim": "higher", "margin": 1}
    confirm = {
        **STUDY,
        "design": "confirm",
        "factors": {},
        "arms": {"even": {"tree.mirror": 1}},
        "contrasts": [contrast],
    }
    assert parse(Study, confirm).contrasts[0].endpoint == "kbit_stored"


def test_what_only_language_models_have_is_refused_for_other_tasks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind is 'facts': sizes are those of language models"):
        size(trial("facts"))
    config = trial("facts", train={"keep_checkpoint": True, "steps": 2})
    run_trial(config, data_root=tmp_path, folder=tmp_path, threads=1)
    with pytest.raises(ConfigError, match=r"model\.pt' is of task 'facts': a language model is expected"):
        load_model(tmp_path / "model.pt")
    study = tmp_path / "s.yaml"
    study.write_text(json.dumps(STUDY))
    with pytest.raises(ConfigError, match=r"s\.yaml' is of task 'facts': it has no corpus"):
        corpus_in(study)


def test_fields_left_out_of_a_dump_have_values_as_factors() -> None:
    factors = {"train.router_steps": [0, 5], "task.facts": [100, 200]}
    study = parse(Study, {**STUDY, "base": {"tree": {"router": "frozen"}}, "factors": factors})
    base = study.trial({})
    assert [base.value(key) for key in factors] == [0, 8192]
    assert {t.factors["train.router_steps"] for t in expand(study).trials} == {0, 5}
    assert changed(study, {"train.router_steps": 5, "task.facts": 8192}) == {"train.router_steps": 5}


def test_settings_of_published_trials_keep_their_form() -> None:
    assert "task" not in Trial().model_dump(mode="json")
    facts = trial("facts")
    assert Trial.model_validate_json(facts.model_dump_json()) == facts
