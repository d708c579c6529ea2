"""`ablate bench study`: its clock, its sums, the ratio of two checkouts, and a whole study under the clock."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ablate.bench import study, study_meter
from ablate.bench.study_meter import Clock, Meter
from ablate.config import ConfigError, Study, parse


def test_a_clock_takes_what_runs_inside_a_part_from_it() -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 8.0, 20.0])
    clock = Clock(lambda: next(now))
    clock.enter("lightning")  # at 1
    clock.enter("forward")  # at 3
    clock.leave()  # at 7
    clock.leave()  # at 8
    assert {part: s for part, s in clock.seconds.items() if s} == {"lightning": 3.0, "forward": 4.0}


def test_a_forward_pass_of_an_evaluation_is_the_evaluations() -> None:
    now = iter(range(10))
    clock = Clock(lambda: next(now))
    for part in ("evaluation", "forward", "kernels"):
        clock.enter(part)
    for _ in range(3):
        clock.leave()
    assert {part: s for part, s in clock.seconds.items() if s} == {"evaluation": 4.0, "kernels": 1.0}


def test_a_function_is_timed_where_it_is_called_and_one_that_is_not_there_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study, "summary", lambda: time.sleep(0.02))
    monkeypatch.setattr(
        study_meter, "TIMED", (("loss", study.__name__, "summary"), ("loss", study.__name__, "no.such"))
    )
    meter = Meter(time.time())
    for part, module, name in study_meter.TIMED:
        meter._wrap(part, module, name)
    study.summary()  # type: ignore[call-arg]
    assert 0.02 <= meter.clock.seconds["loss"] < 2


@pytest.mark.parametrize(
    ("module", "name"), [(m, n) for _, m, n in study_meter.TIMED], ids=[n for _, _, n in study_meter.TIMED]
)
def test_everything_that_is_timed_exists_in_this_version(module: str, name: str) -> None:
    import functools
    import importlib

    assert callable(functools.reduce(getattr, name.split("."), importlib.import_module(module)))


def worker(born: float, ended: float, cpu: float, **parts: float) -> dict[str, Any]:
    seconds = dict.fromkeys(study_meter.PARTS, 0.0) | parts
    return {"born": born, "ended": ended, "cpu": cpu, "starts": [2.0, 0.5, 0.3], "parts": seconds}


def test_core_seconds_add_up_to_the_cores_times_the_command() -> None:
    found = [worker(102, 118, 15, imports=3, forward=11), worker(103, 117, 13, imports=3, forward=10)]
    row = study.summary(found, trials=6, workers=2, started=100, seconds=20)
    assert row["trials_an_hour"] == 1080
    assert sum(row["core_seconds"].values()) * 6 == pytest.approx(40)
    assert row["core_seconds"]["command"] * 6 == pytest.approx(8)  # two seconds before and two after, on both cores
    assert row["core_seconds"]["idle"] * 6 == pytest.approx(5)
    assert row["busy"] == pytest.approx(28 / 32)
    assert row["cpu_seconds"] == pytest.approx(28 / 6)
    assert (row["first_start"], row["later_start"]) == (2.0, 0.4)


def test_a_pair_is_two_runs_of_one_round() -> None:
    rows = [
        {"round": r, "contender": who, "trials_an_hour": per_hour}
        for r, who, per_hour in ((0, "this", 200.0), (0, "against", 100.0), (1, "against", 80.0), (1, "this", 120.0))
    ]
    assert study.ratios(rows, "trials_an_hour") == [2.0, 1.5]
    assert study.ratios(rows[:1], "trials_an_hour") == []


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_study_is_one_that_can_be_run(name: str) -> None:
    wanted = parse(Study, study.settings(name, None))
    assert wanted.trial({}).train.checkpoint_every >= wanted.trial({}).train.steps


def test_trials_are_those_of_the_studies_they_are_named_after() -> None:
    for name in ("first", "confirm"):
        theirs = yaml.safe_load((study.CODE / "studies" / f"{name}.yaml").read_text())["base"]["train"]
        ours = study.settings(name, None)["base"]["train"]
        assert {key: theirs[key] for key in ours if key != "checkpoint_every"} | {
            "checkpoint_every": study.LONG
        } == ours


def test_another_checkout_is_a_folder_with_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another checkout"):
        study.run("facts", against=tmp_path)


def test_a_study_is_run_under_the_clock_beside_itself() -> None:
    rows = study.run("facts", workers=1, steps=5, against=study.CODE)
    assert [row["contender"] for row in rows] == ["this", "against"]
    for row in rows:
        assert row["trials"] == 6
        assert row["core_seconds"].keys() == {*study_meter.PARTS, "command", "idle"}
        for part in ("imports", "corpus", "model", "forward", "backward", "optimizer", "evaluation", "writing"):
            assert row["core_seconds"][part] > 0, part
        assert row["busy"] > 0
        assert sum(row["core_seconds"].values()) == pytest.approx(row["seconds"] / 6, rel=0.05)
