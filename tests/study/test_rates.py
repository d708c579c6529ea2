"""Learning rates of arms: the rule that finds them, and the study that follows it through any kill."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from ablate.config import ConfigError
from ablate.config.endpoints import BPB
from ablate.config.tune import Bracket, Trace, Tune, Values, best_rate, follow
from ablate.results.layout import Layout
from ablate.study.address import default_storage
from ablate.study.designs import expand
from ablate.study.forecast import to_come
from ablate.study.outcome import Outcome
from ablate.study.rates import traces
from ablate.study.runner import run_study
from ablate.study.status import status
from tests.study import objective
from tests.study.test_runner import REPOSITORY, table, wait_for

BASE = 0.003
SETTINGS: dict[str, Any] = {
    "base": {"train": {"steps": 4, "eval_every": 4, "checkpoint_every": 4}},
    "factors": {"tree.mirror": [0, 1]},
    "seeds": [0, 1],
    "tune": {"seeds": [7, 8, 9], "rates": 7},
}


def ended(quality: Callable[[float], float | None], rates: int = 9) -> Trace:
    """The rule's end where a rate's quality is the same on every seed."""
    return follow(Bracket(rates=rates), BASE, BPB, lambda rate: [quality(rate)] * 3)


def octaves(trace: Trace) -> list[float]:
    return [round(math.log2(rate / BASE), 3) for rate in trace.rounds]


@pytest.mark.parametrize("place", [-3.4, -2.0, -0.3, 0.0, 0.6, 1.0, 3.0, 4.2])
def test_a_bracket_ends_within_the_root_of_two_of_the_best_rate_wherever_it_is(place: float) -> None:
    trace = ended(lambda rate: abs(math.log2(rate / BASE) - place))
    assert trace.chosen is not None
    assert abs(math.log2(trace.chosen / BASE) - place) <= 0.25 + 1e-4
    assert not trace.bound
    rates = list(trace.rounds)
    at = rates.index(trace.chosen)
    assert 0 < at < len(rates) - 1
    for neighbour in (rates[at - 1], rates[at + 1]):
        assert max(neighbour, trace.chosen) / min(neighbour, trace.chosen) == pytest.approx(math.sqrt(2), rel=1e-5)


def test_a_bracket_extends_one_rate_at_a_time_and_then_refines_once() -> None:
    trace = ended(lambda rate: abs(math.log2(rate / BASE) - 2.2))
    assert octaves(trace) == [-1, 0, 1, 1.5, 2, 2.5, 3]
    assert list(trace.rounds.values()) == [0, 0, 0, 3, 1, 3, 2]


@pytest.mark.parametrize(("rates", "last"), [(5, 1), (6, 2), (9, 5)])
def test_a_capped_arm_keeps_the_best_of_what_it_tried_as_a_bound(rates: int, last: float) -> None:
    trace = ended(lambda rate: -rate, rates)
    assert trace.bound
    assert trace.chosen == max(trace.rounds)
    assert octaves(trace)[-1] == last
    assert len(trace.rounds) <= rates - 2, "the refinement of an arm with an optimum takes the other two"


def test_a_bracket_goes_no_further_than_a_rate_may() -> None:
    trace = follow(Bracket(rates=9), 6.0, BPB, lambda rate: [-rate] * 3)
    assert (trace.chosen, trace.bound) == (6.0, True)


def test_a_rate_that_diverged_once_is_no_optimum() -> None:
    trace = ended(lambda rate: None if rate > 1.5 * BASE else -rate)
    assert trace.chosen == pytest.approx(BASE * math.sqrt(2), rel=1e-5)
    assert not trace.bound
    assert ended(lambda rate: None).bound


def test_nothing_is_decided_while_a_result_is_missing() -> None:
    known: dict[float, Values] = {BASE: [1.0] * 3, BASE / 2: [2.0] * 3}
    trace = follow(Bracket(), BASE, BPB, known.get)
    assert (trace.chosen, octaves(trace), trace.least) == (None, [-1, 0, 1], 5)


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({0.1: [2.0], 0.2: [1.0], 0.4: [3.0]}, (0.2, False)),
        ({0.1: [1.0, 1.2], 0.2: [1.0, 1.3], 0.4: [3.0, 3.0]}, (0.1, True)),
        ({0.1: [2.0, 2.0], 0.2: [0.1, None], 0.4: [2.5, 2.5]}, (0.1, True)),
        ({0.1: [None], 0.2: [None], 0.4: [None]}, (0.1, True)),
    ],
    ids=["inside", "edge", "diverged-once-loses", "all-diverged"],
)
def test_the_rate_of_a_grid_with_the_lowest_mean_is_chosen(
    rates: dict[float, list[float | None]], chosen: tuple[float, bool]
) -> None:
    trace = follow(Tune(lr=list(rates), seeds=[7, 8]), BASE, BPB, rates.get)
    assert (trace.chosen, trace.bound) == chosen
    assert best_rate(rates, BPB) == chosen[0]


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"seeds": [7, 8]}, "tune.seeds is [7, 8]"),
        ({"seeds": [1, 7, 8]}, "tune.seeds is [1, 7, 8]: they must differ from seeds = [0, 1]"),
        ({"seeds": [7, 8, 9], "pilot": [9]}, "tune.seeds is [7, 8, 9]: they must differ from tune.pilot = [9]"),
        ({"seeds": [7, 8, 9], "pilot": [0]}, "seeds is [0, 1]: they must differ from tune.pilot = [0]"),
        ({"rates": 4}, "tune.rates is 4"),
        ({"lr": [0.1, 0.2], "seeds": [9], "rates": 5}, "tune.rates: unknown setting; allowed here: lr, seeds"),
        ("best", "tune is 'best': none, bracket, or a mapping is expected"),
        (3, "tune is 3: none, bracket, or a mapping is expected"),
    ],
    ids=str,
)
def test_a_bad_rule_is_one_line(tune: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        objective.study(**{**SETTINGS, "tune": tune})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_study_file_of_before_has_the_hash_that_it_had() -> None:
    grid = {"lr": [0.002, 0.004], "seeds": [9]}
    study = objective.study(tune=grid)
    assert study.settled()["tune"] == grid
    assert expand(objective.study()).hash == expand(objective.study(tune="none")).hash


def test_in_a_search_the_rate_is_a_dimension() -> None:
    search = {"design": "search", "budget": {"trials": 9}, "factors": {"tree.mirror": [0, 1]}, "tune": "bracket"}
    with pytest.raises(ConfigError, match=r"tune: in design 'search' the learning rate is a dimension; put train\.lr"):
        expand(objective.study(**{**SETTINGS, **search}))


def test_a_bracket_is_not_cut_short_by_the_budget() -> None:
    with pytest.raises(ConfigError, match=r"budget.trials is 45: the design has up to 46 trials"):
        expand(objective.study(**SETTINGS, budget={"trials": 45}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rates")
    outcome = run_study(objective.study(**SETTINGS), root, run=objective.rated, workers=2)
    assert outcome.exit_code == 0
    return root


def plan_of(root: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((root / "results/cheap/plan.json").read_text())
    return document


def test_a_study_whose_best_rate_lies_outside_ends_with_an_interior_one(finished: Path) -> None:
    tuned = plan_of(finished)["tuned"]
    far, capped = tuned["mirror=0"], tuned["mirror=1"]
    assert (far["lr"], far["at_edge"], len(far["tried"])) == (pytest.approx(4 * BASE), False, 7)
    assert (capped["lr"], capped["at_edge"], len(capped["tried"])) == (pytest.approx(8 * BASE), True, 5)
    records = table(finished).values()
    for arm, found in tuned.items():
        evaluated = {(r["seed"], r["config"]["train"]["lr"]) for r in records if (r["arm"], r["kind"]) == (arm, "arm")}
        assert evaluated == {(seed, found["lr"]) for seed in (0, 1)}


def test_every_rate_is_a_point_in_optuna(finished: Path) -> None:
    name = f"cheap-{plan_of(finished)['space']}"
    found = optuna.load_study(study_name=name, storage=default_storage(finished))
    rates = sorted(t.params["train.lr"] for t in found.trials if t.user_attrs["kind"] == "tune")
    tried = [entry["lr"] for found in plan_of(finished)["tuned"].values() for entry in found["tried"]]
    assert rates == pytest.approx(sorted(tried * 3))
    assert len({t.distributions["train.lr"] for t in found.trials if t.params}) == 1, "a growing range is another one"


@pytest.mark.soak
def test_killed_in_the_middle_of_the_bracket_it_ends_with_the_same_table(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.study.run", str(tmp_path), "2", "rated_slowly", json.dumps(SETTINGS)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    layout = Layout(tmp_path, "cheap")
    wait_for(lambda: len(layout.done()) >= 20)  # the first bracket has 18 trials
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    psutil.wait_procs(workers, timeout=5)
    now = status("cheap", tmp_path)
    assert now.tuning is not None
    assert 18 < now.tuning.done < now.tuning.most
    outcome = run_study(objective.study(**SETTINGS), tmp_path, run=objective.rated, workers=2)
    assert outcome == Outcome(done=len(table(finished)), total=len(table(finished)))
    assert table(tmp_path) == table(finished)
    assert plan_of(tmp_path) == plan_of(finished)


def test_status_shows_what_tuning_has_done(finished: Path) -> None:
    now = status("cheap", finished)
    assert str(now.tuning) == "36 of 36 trials, 2 of 2 arms have their rate; a bound, not an optimum: mirror=1"
    assert (now.done, now.total) == (40, 40)


def test_the_forecast_counts_tuning(tmp_path: Path) -> None:
    study = objective.study(**SETTINGS)
    known, _ = traces(study, Layout(tmp_path, "cheap"))
    plan = expand(study, known)
    certain, perhaps = to_come(plan, known)
    assert (len(plan.trials), plan.waiting_for_tune, plan.tuning, plan.total) == (18, 4, (30, 42), 34)
    assert (len(plan.trials) + len(certain), len(perhaps)) == (34, 12)
    assert plan.tuning_text.endswith("30 to 42 of the trials tune them (5 to 7 rates an arm on 3 seeds)")
