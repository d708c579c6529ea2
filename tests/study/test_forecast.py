"""What `ablate study plan` predicts, against what small studies really took.

`timings.json` holds what `tests/study/timings.py` measured: the parts that a forecast is made of, and the wall time of the run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ablate.config import Study, parse
from ablate.results.layout import Layout
from ablate.study.designs import expand
from ablate.study.forecast import (
    COMMAND,
    NEW_STORES,
    WORKERS_END,
    _search_to_do,
    between,
    ends,
    priced,
    shapes_of,
    to_do,
    wall,
)
from ablate.study.probes import Cost, Start
from tests.study import objective
from tests.study.timings import FILE, STUDIES, WORKERS

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))
START = Start(process=10.0, first=2.0)


@pytest.mark.parametrize("name", STUDIES)
def test_a_forecast_is_within_thirty_percent(name: str, tmp_path: Path) -> None:
    recorded, study = RECORDED[name], parse(Study, {**STUDIES[name], "name": name})
    phases, _ = to_do(expand(study), {}, Layout(tmp_path, name))
    shapes = shapes_of(phases)
    measured = {shape: Cost(**cost) for shape, cost in zip(ends(shapes), recorded["costs"], strict=True)}
    seconds = priced(phases, between(shapes, measured))
    told = wall(seconds, WORKERS, Start(**recorded["start"]), new_stores=recorded["new_stores"])
    assert told == pytest.approx(recorded["seconds"], rel=0.3)


def test_a_forecast_fills_workers_in_turn_and_starts_them_in_every_phase() -> None:
    command, begin, end = COMMAND * START.process, START.process + START.first, WORKERS_END * START.process
    assert wall([[]], 2, START) == 0, "nothing is started for nothing"
    assert wall([[10.0]], 2, START) == pytest.approx(command + begin + 10 + end)
    assert wall([[10.0] * 3], 2, START) == pytest.approx(command + begin + 20 + end), "the third waits for a worker"
    assert wall([[10.0, 3.0, 3.0, 3.0]], 2, START) == pytest.approx(command + begin + 10 + end)
    assert wall([[10.0] * 4, [5.0] * 2], 2, START) == pytest.approx(command + 2 * (begin + end) + 20 + 5)
    more = wall([[10.0]], 2, START, new_stores=True) - wall([[10.0]], 2, START)
    assert more == pytest.approx(NEW_STORES * START.process)


@pytest.mark.parametrize(
    ("budget", "race"),
    [({"trials": 30}, 26), ({"tokens": 5 * 20 * 8 * 256 - 1}, 5), ({"trials": 6, "tokens": 5 * 20 * 8 * 256}, 2)],
    ids=["trials", "tokens", "both"],
)
def test_every_limit_of_a_search_says_how_many_runs_are_to_do(
    budget: dict[str, int], race: int, tmp_path: Path
) -> None:
    settings = {"design": "search", "factors": {"tree.mirror": {"range": {"low": 0, "high": 1}}}, "budget": budget}
    study = objective.study(**settings, finalists={"count": 2})
    phases, _ = to_do(expand(study), {}, Layout(tmp_path, study.name))
    assert [len(phase) for phase in phases] == [race, 4]


def test_hours_allow_so_many_runs_as_fit(tmp_path: Path) -> None:
    settings = {
        "design": "search",
        "factors": {"tree.mirror": {"range": {"low": 0, "high": 1}}},
        "budget": {"hours": 1},
    }
    plan = expand(objective.study(**settings, finalists={"count": 0}))
    left = [len(_search_to_do(plan, Layout(tmp_path, "cheap"), seconds)[0]) for seconds in (60.0, 7.0)]
    assert left == [60, 515], "the run that reaches the limit is still finished"
