"""Many workers on one database: no trial lost or run twice, and little time spent beside training."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ablate.results.layout import Layout
from ablate.study.address import default_storage
from ablate.study.designs import expand
from ablate.study.outcome import Outcome
from ablate.study.queue import Queue
from ablate.study.runner import run_study
from ablate.study.storage import open_storage
from ablate.tracking.store import default_uri
from ablate.tracking.tracker import MlflowTracker
from tests.study import objective
from tests.study.postgres import postgres

SHORT: dict[str, Any] = {"seeds": list(range(125)), "base": {"train": {"steps": 2, "eval_every": 2}}}
FIRST_SECONDS = 5.0
"""CPU seconds until the first worker starts, of which the imports take about half."""
MOST_OVERHEAD = 0.5
"""Seconds a trial of study and tracking together."""


def five_hundred(root: Path, storage: str, workers: int) -> None:
    started = time.perf_counter()
    study = objective.study(**SHORT)
    outcome = run_study(study, root, run=objective.timed, workers=workers, storage=storage)
    seconds = time.perf_counter() - started
    print(f"500 trials, {workers} workers: {seconds:.1f} s, {seconds / 500:.3f} s a trial")
    assert outcome == Outcome(done=500, total=500)
    queue = Queue(expand(study), open_storage(storage))
    trials = queue.study.get_trials(deepcopy=False)
    assert [t.state.name for t in trials] == ["COMPLETE"] * 500
    planned = sorted(t.hash for t in expand(study).trials)
    assert sorted(t.user_attrs["trial"] for t in trials) == planned
    assert sorted(t["trial"] for t in times(root)) == planned, "each was run, and run once"
    assert len({t["worker"] for t in times(root)}) == workers, "every worker had some"


def times(root: Path) -> list[dict[str, Any]]:
    """What `objective.timed` noted: trial, worker, start and end."""
    return [json.loads(line) for path in (root / "times").iterdir() for line in path.read_text().splitlines()]


@pytest.mark.soak
@pytest.mark.soak_short
def test_the_first_of_ten_thousand_trials_starts_in_seconds(tmp_path: Path) -> None:
    settings = {"seeds": list(range(2500))}
    command = [sys.executable, "-m", "tests.study.run", str(tmp_path), "1", "slow", json.dumps(settings)]
    process = psutil.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    try:
        assert any("starting 1 workers" in line for line in process.stderr)
        times = process.cpu_times()
        print(f"{times.user + times.system:.1f} s of CPU, with the imports, before the first worker")
        assert times.user + times.system <= FIRST_SECONDS
    finally:
        process.kill()


@pytest.mark.soak
def test_five_hundred_trials_on_one_sqlite_file(tmp_path: Path) -> None:
    five_hundred(tmp_path, default_storage(tmp_path), workers=4)


@pytest.mark.soak
@pytest.mark.postgres
def test_five_hundred_trials_on_postgresql(tmp_path: Path) -> None:
    with postgres(tmp_path) as url:
        five_hundred(tmp_path, url, workers=8)


@pytest.mark.soak
@pytest.mark.soak_short
def test_study_and_tracking_cost_half_a_second_a_trial_at_most(tmp_path: Path) -> None:
    """Between the first trial's start and the last one's end, so without imports; summed over both workers."""
    study = objective.study(seeds=list(range(15)))
    tracker = MlflowTracker(default_uri(tmp_path))
    assert run_study(study, tmp_path, run=objective.timed, workers=2, tracker=tracker) == Outcome(done=60, total=60)
    wall = training = 0.0
    for worker in {t["worker"] for t in times(tmp_path)}:
        mine = [t for t in times(tmp_path) if t["worker"] == worker]
        wall += max(t["end"] for t in mine) - min(t["start"] for t in mine)
        training += sum(t["end"] - t["start"] for t in mine)
    overhead = (wall - training) / 60
    print(f"{overhead:.3f} s a trial beside training")
    assert Layout(tmp_path, "cheap").done() == {t.hash for t in expand(study).trials}
    assert overhead <= MOST_OVERHEAD
