"""Studies finish with exactly their planned trials, whoever is killed on the way."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ablate.config import ConfigError
from ablate.results.layout import Layout
from ablate.results.record import load_record
from ablate.study.address import default_storage
from ablate.study.designs import expand
from ablate.study.outcome import Outcome
from ablate.study.progress import Display
from ablate.study.queue import Queue
from ablate.study.runner import run_study
from ablate.study.storage import open_storage
from tests.study import objective

REPOSITORY = Path(__file__).parents[2]


def run(root: Path, **options: Any) -> Outcome:
    settings = options.pop("settings", {})
    return run_study(objective.study(**settings), root, run=options.pop("run", objective.descend), **options)


def start(
    root: Path, *, workers: int = 2, run: str = "slow", settings: dict[str, Any] | None = None
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.study.run", str(root), str(workers), run, json.dumps(settings or {})]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def table(root: Path, name: str = "cheap") -> dict[str, Any]:
    """All results, without what depends on when and where they were made."""
    layout = Layout(root, name)
    return {trial: load_record(layout.record(trial)).model_dump(exclude={"run_id"}) for trial in sorted(layout.done())}


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert run(root, workers=2) == Outcome(done=8, total=8)
    return root


def test_every_planned_trial_is_done_once(undisturbed: Path) -> None:
    plan = expand(objective.study())
    assert set(table(undisturbed)) == {t.hash for t in plan.trials}
    document = json.loads((undisturbed / "results/cheap/plan.json").read_text())
    assert document["hash"] == plan.hash
    assert [t["trial"] for t in document["trials"]] == [t.hash for t in plan.trials]
    assert not any((undisturbed / "state/trials").iterdir()), "checkpoints of finished trials are removed"


def test_a_second_run_trains_nothing(undisturbed: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (undisturbed / "results").rglob("*")}
    assert run(undisturbed).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in (undisturbed / "results").rglob("*")} == before


def test_a_lost_database_costs_nothing(undisturbed: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'new.db'}"
    assert run(undisturbed, storage=storage) == Outcome(done=8, total=8)


def test_added_seeds_extend_and_a_deleted_result_is_made_again(tmp_path: Path) -> None:
    run(tmp_path, settings={"seeds": [0]})
    first = table(tmp_path)
    assert len(first) == 4
    gone = sorted(first)[0]
    Layout(tmp_path, "cheap").record(gone).unlink()
    assert run(tmp_path, settings={"seeds": [0, 1]}) == Outcome(done=8, total=8)
    again = table(tmp_path)
    assert {name: again[name] for name in first} == first


def in_flight(root: Path) -> int:
    """Trials with a checkpoint and at least 0.4 s to go."""
    return sum(json.loads(p.read_text())["step"] <= 12 for p in (root / "state" / "trials").glob("*/last.json"))


@pytest.mark.parametrize("whom", [pytest.param("worker", marks=pytest.mark.soak), "all", "polite"])
def test_killed_and_repeated_gives_the_same_table(undisturbed: Path, tmp_path: Path, whom: str) -> None:
    process = start(tmp_path)
    wait_for(lambda: len(Layout(tmp_path, "cheap").done()) >= 2 and in_flight(tmp_path) == 2)
    parent = psutil.Process(process.pid)
    workers = [p for p in parent.children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    if whom == "worker":
        workers[0].kill()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
        assert "was killed (SIGKILL); its trial goes on elsewhere" in out
    else:
        if whom == "all":
            workers[0].kill()
        process.send_signal(signal.SIGTERM if whom == "polite" else signal.SIGKILL)
        process.wait(timeout=30)
        assert process.returncode == (143 if whom == "polite" else -signal.SIGKILL)
        psutil.wait_procs(workers, timeout=5)
        assert not any(w.is_running() for w in workers), "workers end with their parent"
        left = list((tmp_path / "state" / "trials").glob("*/last.json"))
        assert left, "the trials in flight have checkpoints"
        assert run(tmp_path, workers=2) == Outcome(done=8, total=8)
    assert table(tmp_path) == table(undisturbed)


def test_a_live_study_is_not_run_twice(tmp_path: Path) -> None:
    process = start(tmp_path, workers=1)
    try:
        wait_for(lambda: (tmp_path / "state/locks/cheap.pid").exists())
        with pytest.raises(ConfigError, match=rf"'cheap' is running already, as process {process.pid}"):
            run(tmp_path)
        wait_for(lambda: (tmp_path / "results/cheap/plan.json").exists())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
    finally:
        process.kill()


def test_failures_are_retried_twice_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(tmp_path, run=objective.sick, settings={"seeds": [0]})
    out = capsys.readouterr().err
    assert outcome.exit_code == 1
    assert outcome.failed == ["mirror=1 placement=tree, seed 0: FloatingPointError: this arm never works"]
    assert out.count("failed, will be tried again") == 2
    assert "was killed (SIGKILL); its trial goes on elsewhere" in out
    assert outcome.done == 3
    records = {r["arm"]: r for r in table(tmp_path).values()}
    assert records["mirror=0 placement=tree"]["status"] == "diverged"
    assert records["mirror=1 placement=unit"]["status"] == "finished"
    error = (tmp_path / "state/trials").glob("*/error.txt")
    assert "FloatingPointError: this arm never works" in next(error).read_text()
    assert run(tmp_path, settings={"seeds": [0]}) == Outcome(done=4, total=4), "a new run is a new chance"


def test_a_changed_confirm_plan_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "design": "confirm",
        "factors": {},
        "arms": {"even": {"tree.mirror": 1}},
        "contrasts": [{"arm": "even", "claim": "lower", "margin": 0.01}],
    }
    assert run(tmp_path, settings=settings) == Outcome(done=4, total=4)
    before = table(tmp_path)
    settings["contrasts"] = [{"arm": "even", "claim": "lower", "margin": 0.02}]
    with pytest.raises(ConfigError, match="a confirm plan may not change"):
        run(tmp_path, settings=settings)
    assert table(tmp_path) == before


def test_rates_are_tuned_before_evaluation(tmp_path: Path) -> None:
    tune = {"lr": [0.01, 0.1, 1.0], "seeds": [7, 8]}
    outcome = run(tmp_path, settings={"factors": {"tree.mirror": [0, 1]}, "tune": tune}, workers=2)
    assert outcome == Outcome(done=16, total=16)
    records = list(table(tmp_path).values())
    plan = json.loads((tmp_path / "results/cheap/plan.json").read_text())
    for arm in ("mirror=0", "mirror=1"):
        tried: dict[float, list[float]] = {}
        for record in records:
            if record["kind"] == "tune" and record["arm"] == arm:
                tried.setdefault(record["config"]["train"]["lr"], []).append(record["history"][-1]["bpb"])
        assert {len(v) for v in tried.values()} == {2}
        best = min(tried, key=lambda lr: sum(tried[lr]))
        evaluated = [r["config"]["train"]["lr"] for r in records if r["kind"] == "arm" and r["arm"] == arm]
        assert evaluated == [best, best]
        assert plan["tuned"][arm]["lr"] == best
        assert plan["tuned"][arm]["at_edge"] is (best != 0.1)
    assert run(tmp_path, settings={"factors": {"tree.mirror": [0, 1]}, "tune": tune}) == outcome


def _claim(root: Path, number: int) -> list[str]:
    queue = Queue(expand(objective.study(seeds=list(range(20)))), open_storage(default_storage(root)))
    claimed = []
    while claim := queue.claim(f"here:{number}"):
        claimed.append(str(claim.hash))
        time.sleep(random.uniform(0, 0.005))
    return claimed


def test_no_trial_is_claimed_twice(tmp_path: Path) -> None:
    """Optuna's own claim on SQLite, read and then write, hands the same trial to two workers now and then."""
    plan = expand(objective.study(seeds=list(range(20))))
    queue = Queue(plan, open_storage(default_storage(tmp_path)))
    queue.reconcile(set(), load_record, "here")  # type: ignore[arg-type]
    for _ in plan.trials:  # each call puts in what it can in half a second
        queue.fill(0)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        claims = pool.starmap(_claim, [(tmp_path, i) for i in range(4)])
    assert sorted(itertools.chain(*claims)) == sorted(t.hash for t in plan.trials)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"workers": 0}, "workers is 0"), ({"storage": "nonsense"}, "storage is 'nonsense'")],
    ids=["workers", "storage"],
)
def test_unusable_options_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, **options)


def test_progress_without_a_terminal_is_a_line_a_trial(undisturbed: Path, tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    settings: dict[str, Any] = {"factors": {"tree.mirror": [0, 1]}, "seeds": [0]}
    display = Display(objective.study(**settings), 1, Console(file=out, width=200))
    run(tmp_path, settings=settings, display=display)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("[")]
    assert [line.split("]")[0] for line in lines] == ["[1/2", "[2/2"]
    assert "mirror=0 · seed 0: finished, " in lines[0]


def test_nothing_of_a_trial_stays_in_its_worker(tmp_path: Path) -> None:
    outcome = run_study(objective.study(), tmp_path, workers=1, run=objective.cyclic)
    assert outcome == Outcome(8, 8)
