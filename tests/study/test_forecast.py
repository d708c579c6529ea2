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
from ablate.study.forecast import COMMAND, NEW_STORES, WORKERS_END, between, ends, priced, shapes_of, to_do, wall
from ablate.study.probes import Cost, Start
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
