"""`evaluate`: bits per byte on any corpus, and offline questions that a trained model answers and an untrained not."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ablate.config import PRESETS, ConfigError, Questions, Trial
from ablate.data.tokens import prepare
from ablate.evaluation import tasks
from ablate.evaluation.evaluate import bits_per_byte_of, clustered_error, corpus_of, evaluate
from ablate.evaluation.scores import Evaluated, columns
from ablate.model.transformer import Transformer
from ablate.training.checkpoint import load_model
from ablate.training.result import TrialResult
from ablate.training.trial import run_trial
from tests.evaluation.conftest import Trained

pytest.importorskip("lm_eval")


QUESTIONS = 160
"""Of each task, so that all of it takes seconds."""


def value(found: Evaluated, metric: str, task: str = tasks.CONTINUATION, shots: int = 0) -> float:
    return next(s.value for s in found.scores if (s.task, s.shots, s.metric) == (task, shots, metric))


def beats(found: Evaluated, metric: str, task: str = tasks.CONTINUATION, shots: int = 0) -> bool | None:
    return next(s.beats_chance for s in found.scores if (s.task, s.shots, s.metric) == (task, shots, metric))


@pytest.fixture(scope="module")
def found(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluated, Path]:
    folder = tmp_path_factory.mktemp("found")
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the network was asked for")

        patch.setattr(socket.socket, "connect", refuse)
        result = evaluate(
            trained.model,
            trained.trial,
            trained.own,
            folder=folder,
            tasks_folder=folder / "tasks",
            shots=(0, 2),
            limit=QUESTIONS,
        )
    return result, folder


def test_trained_beats_chance_and_untrained_does_not(
    trained: Trained, found: tuple[Evaluated, Path], tmp_path: Path
) -> None:
    untrained = evaluate(
        trained.untrained(),
        trained.trial,
        trained.own,
        task_names=[tasks.CONTINUATION],
        shots=[0],
        folder=tmp_path,
        tasks_folder=tmp_path,
        limit=QUESTIONS,
    )
    for metric in ("acc", "acc_mutual_info"):
        assert beats(found[0], metric) is True
        assert beats(found[0], metric, shots=2) is True
        assert beats(untrained, metric) is False
    assert value(found[0], "bits") < value(untrained, "bits")


def test_the_unigram_baseline_is_printed_and_a_context_adds_nothing_to_it(found: tuple[Evaluated, Path]) -> None:
    for score in found[0].scores:
        assert score.unigram is not None
        assert score.over_unigram == pytest.approx(score.value - score.unigram)
        if score.metric == "acc_mutual_info":
            assert score.unigram == pytest.approx(tasks.CHANCE["acc_mutual_info"], abs=1e-12)  # four-way ties
        if score.metric == "acc":
            assert score.unigram == pytest.approx(0.25, abs=0.12)


def test_items_are_kept_and_give_the_scores(found: tuple[Evaluated, Path]) -> None:
    result, folder = found
    assert Evaluated.model_validate_json((folder / "evaluation.json").read_text()) == result
    items = pl.read_parquet(folder / "items.parquet")
    for score in result.scores:
        of = items.filter(task=score.task, shots=score.shots, metric=score.metric, scorer="model")
        assert of.height == score.items
        assert of["document"].n_unique() == score.documents
        assert of["value"].mean() == pytest.approx(score.value)
        means = of.group_by("document").agg(pl.col("value").sum(), pl.len())
        rest = (means["value"] - score.value * means["len"]).to_numpy()
        assert score.error == pytest.approx(math.sqrt(len(rest) / (len(rest) - 1) * (rest**2).sum()) / score.items)
    likelihoods = items.filter(
        pl.col("metric").str.starts_with("log_likelihood/"), scorer="model", task=tasks.CLOZE, shots=0
    )
    assert likelihoods["metric"].n_unique() == 2 * tasks.CHOICES
    assert (likelihoods["value"] <= 0).all()


def test_evaluation_repeats_exactly_and_draws_no_random_numbers(
    trained: Trained, found: tuple[Evaluated, Path], tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    again = evaluate(
        trained.model,
        trained.trial,
        trained.own,
        task_names=[tasks.CLOZE],
        shots=[2],
        folder=tmp_path,
        tasks_folder=tmp_path,
        limit=QUESTIONS,
    )
    assert [s for s in found[0].scores if s.task == tasks.CLOZE and s.shots == 2] == again.scores
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_asks_its_questions_at_its_end(trained: Trained, found: tuple[Evaluated, Path], tmp_path: Path) -> None:
    asked = Questions(tasks=(tasks.CONTINUATION,), shots=(0,), limit=QUESTIONS)
    trial = trained.trial.model_copy(update={"questions": asked})
    result = run_trial(trial, data_root=trained.data_root, folder=tmp_path / "run", threads=1)
    assert result.scores == [s for s in found[0].scores if s.task == tasks.CONTINUATION and s.shots == 0]
    assert result.final.bpb == trained.result.final.bpb
    assert trained.result.scores == []
    assert TrialResult.model_validate_json(result.model_dump_json()) == result
    items = pl.read_parquet(tmp_path / "run" / "items.parquet")
    assert set(items["task"]) == {tasks.CONTINUATION}
    flat = columns(result.scores)
    name = f"qa/{tasks.CONTINUATION}/0shot/acc"
    assert flat[name] > flat[f"{name}/chance"] == 0.25
    assert {f"{name}/error", f"{name}/unigram"} <= flat.keys()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tasks": ["heldout_clozed"]}, "task 'heldout_clozed' is not known"),
        ({"tasks": ["heldout_cloze"]}, "task 'heldout_cont.*cannot be made"),
    ],
    ids=["unknown", "too-few-documents"],
)
def test_what_cannot_be_asked_is_said_before_training(
    asked: dict[str, Any], message: str, trained: Trained, tmp_path: Path
) -> None:
    few = {"max_documents": 4} if asked["tasks"] == ["heldout_cloze"] else {}
    corpus = trained.trial.corpus.model_copy(update=few)
    trial = trained.trial.model_copy(update={"questions": Questions.model_validate(asked), "corpus": corpus})
    with pytest.raises(ConfigError, match=message):
        run_trial(trial, data_root=tmp_path / "data", folder=tmp_path / "run", threads=1)
    assert not (tmp_path / "run" / "usage.parquet").exists()


def test_bits_per_byte_is_that_of_training(trained: Trained, found: tuple[Evaluated, Path]) -> None:
    quality = found[0].quality[0]
    assert quality.bpb == pytest.approx(trained.result.final.bpb, rel=1e-6)
    assert quality.tokens == 2112  # whole windows of 96
    assert 0 < quality.error < quality.bpb / 5
    assert found[0].metrics()[f"bpb/{quality.corpus}"] == quality.bpb


def test_a_corpus_in_other_tokens_is_read_in_the_model_s_own(trained: Trained) -> None:
    as_bytes = trained.trial.corpus.model_copy(update={"tokenizer": "bytes"})
    other = prepare(as_bytes, trained.data_root)
    assert other.tokenizer_hash != trained.own.tokenizer_hash
    own = bits_per_byte_of(trained.model, trained.own, trained.own, 2048)
    assert bits_per_byte_of(trained.model, other, trained.own, 2048) == own


def test_training_text_is_not_needed(trained: Trained) -> None:
    poor = dataclasses.replace(trained.own, train=trained.own.train[:3])
    own = bits_per_byte_of(trained.model, trained.own, trained.own, 2048)
    assert bits_per_byte_of(trained.model, poor, trained.own, 2048) == own


def test_another_tokenizer_under_the_same_settings_is_refused(trained: Trained) -> None:
    with pytest.raises(ConfigError, match="trained with 0123456789abcdef"):
        corpus_of(trained.trial, "0123456789abcdef", trained.data_root)


@pytest.mark.soak
def test_unknown_and_unreachable_tasks_are_said(trained: Trained, tmp_path: Path) -> None:
    def run(task: str) -> None:
        evaluate(
            trained.model,
            trained.trial,
            trained.own,
            task_names=[task],
            shots=[0],
            folder=tmp_path,
            tasks_folder=tmp_path,
        )

    with pytest.raises(ConfigError, match="task 'hellaswagg' is not known"):
        run("hellaswagg")
    with pytest.raises(ConfigError, match="task 'hellaswag' cannot be fetched"):
        run("hellaswag")


def test_questions_hold_what_they_say(trained: Trained, tmp_path: Path) -> None:
    folder = tasks.write_tasks(trained.own, tmp_path)
    texts = dict(trained.own.held_out("validation").select("id", "text").iter_rows())
    texts |= dict(trained.own.held_out("test").select("id", "text").iter_rows())
    for task in tasks.OFFLINE:
        questions = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
        examples = [json.loads(line) for line in (folder / f"{task}.shots.jsonl").read_text().splitlines()]
        asked = {q["document"] for q in questions}
        assert len(asked) > 10
        assert not asked & {e["document"] for e in examples}
        for question in questions:
            truth = question["choices"][question["answer"]]
            assert question["context"] + truth in texts[question["document"]]
            assert len(set(question["choices"])) == tasks.CHOICES
            assert all(choice[0].isspace() for choice in question["choices"])
            assert not question["context"][-1].isspace()
            if task == tasks.CONTINUATION:
                assert {len(choice) for choice in question["choices"]} == {tasks.CONTINUATION_CHARACTERS}
            else:
                assert truth[1:] in question["context"]
    again = tasks.write_tasks(trained.own, tmp_path / "again")
    assert all((folder / f"{t}.jsonl").read_bytes() == (again / f"{t}.jsonl").read_bytes() for t in tasks.OFFLINE)


@pytest.mark.parametrize(
    ("totals", "acc"),
    [
        ([-3.0, -1.0, -4.0, -5.0], 1.0),
        ([-1.0, -3.0, -4.0, -5.0], 0.0),
        ([-1.0, -1.0, -4.0, -5.0], 1 / 2),
        ([-1.0, -1.0 - 1e-6, -1.0, -5.0], 1 / 3),  # apart by arithmetic only
        ([-2.0, -2.0, -2.0, -2.0], 1 / 4),
        ([-1.0, -4.0, -1.0, -5.0], 0.0),
        ([-math.inf] * 4, 1 / 4),
    ],
    ids=["best", "worse", "two-tie", "three-tie", "all-tie", "others-tie", "impossible"],
)
def test_ties_are_shared(totals: list[float], acc: float) -> None:
    doc = {"choices": [" a", " bcd", " e", " f"], "answer": 1}
    with_flat_prior = [(t, False) for t in totals] + [(-7.0, False)] * 4
    scored = tasks.score(doc, with_flat_prior)
    assert scored["acc"] == scored["acc_mutual_info"] == pytest.approx(acc)
    assert scored["bits"] == pytest.approx(-totals[1] / math.log(2) / 4)


def test_mutual_information_leaves_out_how_likely_a_choice_is_by_itself() -> None:
    doc = {"choices": [" a", " b", " c", " d"], "answer": 2}
    scored = tasks.score(
        doc, [(-1.0, True), (-2.0, False), (-3.0, True), (-4.0, False), *((t, False) for t in (-1.0, -2.0, -6.0, -4.0))]
    )
    assert (scored["acc"], scored["acc_mutual_info"], scored["greedy"]) == (0.0, 1.0, 1.0)


def test_a_model_without_numbers_is_not_scored() -> None:
    with pytest.raises(ValueError, match="not numbers"):
        tasks.score({"choices": [" a"] * 4, "answer": 0}, [(math.nan, False)] * 8)


def test_clustered_error_counts_documents_not_questions() -> None:
    values = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert clustered_error(values, list("abcdef")) == pytest.approx(np.std(values, ddof=1) / math.sqrt(6))
    assert clustered_error(values, list("aaabbb")) == pytest.approx(math.sqrt(2 * (2 * 1.5**2)) / 6)
    assert clustered_error(values, list("aaaaaa")) == math.inf


@pytest.mark.soak
def test_a_nano_model_of_the_default_corpus_beats_chance_and_an_untrained_one_does_not(tmp_path: Path) -> None:
    train = {"steps": 1000, "eval_every": 1000, "keep_checkpoint": True}
    trial = Trial.model_validate({**PRESETS["nano"], "train": train})
    run_trial(trial, data_root=tmp_path / "data", folder=tmp_path / "run")
    model, _, tokenizer_hash = load_model(tmp_path / "run" / "model.pt")
    own = corpus_of(trial, tokenizer_hash, tmp_path / "data")
    for net, expected in ((model, True), (Transformer(trial, own.vocab_size), False)):
        result = evaluate(net, trial, own, shots=[0], folder=tmp_path, tasks_folder=tmp_path)
        for score in result.scores:
            print(score)
        assert beats(result, "acc_mutual_info") is expected
