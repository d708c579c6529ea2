"""Searches end to end on a cheap objective: every design that the schema admits, budgets, racing, kills, lost databases."""

# Longer than 400 lines because all of it runs searches on one cheap objective with the helpers at its head.
from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest

from ablate.config import ConfigError
from ablate.results.layout import Layout
from ablate.study.address import default_storage
from ablate.study.designs import expand
from ablate.study.outcome import Outcome
from ablate.study.race import beaten_by, ranked
from ablate.study.samplers import key_of, propose
from ablate.study.space import Space
from ablate.study.status import status
from tests.study import objective
from tests.study.test_runner import run, start, table, wait_for

SHAPES: dict[str, Any] = {
    "tree.depth": {"range": {"low": 2, "high": 9}},
    "tree.leaf_width": [1, 2, 4, 8],
    "tree.mirror": {"range": {"low": -1, "high": 1}},
    "tree.placement": ["unit", "tree"],
    "tree.node_mirror": {"range": {"low": -1, "high": 1}, "when": {"tree.placement": "unit"}},
    "train.lr": {"range": {"low": 0.001, "high": 1, "log": True}},
}
SEARCH: dict[str, Any] = {"design": "search", "factors": SHAPES, "seeds": [0, 1, 2]}


def search(trials: int, **changes: Any) -> dict[str, Any]:
    return {**SEARCH, "budget": {"trials": trials}, **changes}


def candidates(root: Path) -> dict[str, dict[str, Any]]:
    """Racing runs by candidate: its settings, seeds and results."""
    found: dict[str, dict[str, Any]] = {}
    for record in table(root).values():
        if record["kind"] == "search":
            one = found.setdefault(record["arm"], {"factors": record["factors"], "bpb": {}})
            assert one["factors"] == record["factors"], "a candidate has one configuration"
            one["bpb"][record["seed"]] = record["history"][-1]["bpb"]
    return found


def stored(root: Path, suffix: str = "") -> optuna.Study:
    url = default_storage(root)
    names = [n for n in optuna.get_all_study_names(url) if n.endswith("-finalists") == bool(suffix)]
    return optuna.load_study(study_name=names[-1], storage=url)


SETTINGS: list[dict[str, Any]] = [
    {"match": "total_units"},
    {"match": "total_units", "objectives": ["bpb", "n_eff_frac"]},
    {"pruner": "median", "match": "total_units"},
    {},
    {"match": "active_units", "factors": {k: v for k, v in SHAPES.items() if k != "tree.leaf_width"}},
    {"objectives": ["n_eff_frac", "dead_frac", "bits_lost"]},
    {"pruner": "halving"},
    {"sampler": "random"},
    {"sampler": "qmc", "match": "total_units"},
    {"sampler": "cmaes"},
    {"sampler": "gp", "match": "total_units", "objectives": ["bpb", "n_eff_frac"]},
    {"sampler": {"name": "nsga2", "population": 3}, "objectives": ["bpb", "n_eff_frac"]},
    {"sampler": {"name": "tpe", "multivariate": True, "startup": 3}, "match": "total_units"},
    {"race": 0, "seeds": [4]},
    {"finalists": {"count": 0}},
]
QUICK = 3
"""So many are in the fast tests; the others are in the short cut of the long proofs, which CI runs too."""


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(s, id=json.dumps(s)[1:60] or "plain", marks=[] if place < QUICK else pytest.mark.soak_short)
        for place, s in enumerate(SETTINGS)
    ],
)
def test_a_search_meets_its_budget_exactly_and_goes_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"finalists": {"count": 2, "seeds": [10, 11]}, **settings}
    assert run(tmp_path, settings=search(14, **settings), workers=2) == Outcome(done=14, total=14)
    first = table(tmp_path)
    found = candidates(tmp_path)
    plan = expand(objective.study(**search(14, **settings)))
    for one in found.values():
        assert sorted(one["bpb"]) == plan.study.seeds[: len(one["bpb"])], "seeds come in their order"
    finals = [r for r in first.values() if r["kind"] == "finalist"]
    count = plan.study.finalists.count
    assert len(finals) == count * len(plan.study.finalist_seeds)
    if plan.study.match != "none":
        target = getattr(plan.study.trial({}).tree, plan.study.match)
        for record in first.values():
            tree = record["config"]["tree"]
            width = tree["leaf_width"]
            units = {
                "total_units": tree["trees"] * ((1 << tree["depth"]) * (1 + width) - 1),
                "active_units": tree["trees"] * (tree["depth"] + width),
            }
            assert 10 * abs(units[plan.study.match] - target) <= target
            assert record["factors"]["tree.trees" if "tree.leaf_width" in plan.study.factors else "tree.leaf_width"]
    study = stored(tmp_path)
    failed = [t for t in study.trials if t.state == optuna.trial.TrialState.FAIL]
    assert not failed, "nothing impossible reaches the storage"
    assert len(study.trials) == len(found)
    assert study.metric_names == list(plan.study.objectives)
    # A larger budget goes on; nothing is run twice.
    assert run(tmp_path, settings=search(20, **settings), workers=2).done >= 20
    again = table(tmp_path)
    assert {name: again[name] for name in first} == first
    assert run(tmp_path, settings=search(20, **settings)).exit_code == 0
    assert table(tmp_path) == again
    assert status("cheap", tmp_path).candidates == len(candidates(tmp_path))


def seeds_of(root: Path) -> list[list[int]]:
    """Racing seeds of each candidate, in the order of their names."""
    return [sorted(one["bpb"]) for _, one in sorted(candidates(root).items())]


def test_a_candidate_that_the_budget_cut_off_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"race": 0, "finalists": {"count": 0}, "sampler": "random"}
    assert run(tmp_path, settings=search(4, **settings)) == Outcome(done=4, total=4)
    assert seeds_of(tmp_path) == [[0, 1, 2], [0]]
    noted = json.loads((tmp_path / "results/cheap/plan.json").read_text())["search"]["candidates"]
    assert [row["out"] for row in noted] == [None, "the budget was used up after 1 of 3 seeds"]
    assert [t.state.name for t in stored(tmp_path).trials] == ["COMPLETE", "WAITING"]
    assert status("cheap", tmp_path).waiting == ["c002"]
    assert run(tmp_path, settings=search(4, **settings)) == Outcome(done=4, total=4)
    for budget, seeds in ((6, [[0, 1, 2], [0, 1, 2]]), (7, [[0, 1, 2], [0, 1, 2], [0]])):
        assert run(tmp_path, settings=search(budget, **settings)).done == budget
        assert seeds_of(tmp_path) == seeds
        assert status("cheap", tmp_path).waiting == ["c003"][: budget - 6]
    noted = json.loads((tmp_path / "results/cheap/plan.json").read_text())["search"]["candidates"]
    assert [row["out"] for row in noted] == [None, None, "the budget was used up after 1 of 3 seeds"]
    assert [t.state.name for t in stored(tmp_path).trials] == ["COMPLETE", "COMPLETE", "WAITING"]


@pytest.mark.parametrize("kind", ["tokens", "hours"])
def test_a_search_ends_with_its_tokens_or_hours(tmp_path: Path, kind: str) -> None:
    limit = {"tokens": 5 * 20 * 8 * 256} if kind == "tokens" else {"hours": 5 * 0.1 / 3600}
    outcome = run(tmp_path, settings={**SEARCH, "budget": limit, "finalists": {"count": 0}, "race": 0})
    assert outcome == Outcome(done=5, total=5)


def test_a_candidate_without_a_value_is_closed_and_the_search_goes_on(tmp_path: Path) -> None:
    """A dense layer has no balance: no worker may break on it."""
    factors = {"tree.mirror": {"range": {"low": -1, "high": 1}}, "model.feedforward": ["tree", "dense"]}
    settings = search(16, factors=factors, objectives=["bpb", "n_eff_frac"], finalists={"count": 1, "seeds": [9]})
    assert run(tmp_path, run=objective.treeless, settings=settings).exit_code == 0
    rows = json.loads((tmp_path / "results/cheap/plan.json").read_text())["search"]["candidates"]
    assert any((row["out"] or "").startswith("has no value for") for row in rows)
    assert any(row["out"] is None for row in rows)


def test_a_finite_space_is_tried_once_and_ends_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = {"tree.mirror": [0, 1], "tree.placement": ["unit", "tree", "sum"]}
    outcome = run(tmp_path, settings=search(60, factors=factors, finalists={"count": 0}, race=0), workers=2)
    assert outcome.done == 18
    assert len(candidates(tmp_path)) == 6
    assert "all 6 candidates of the space have been tried" in capsys.readouterr().err


def test_candidates_of_the_file_come_first_and_an_earlier_search_warms_up(tmp_path: Path) -> None:
    wanted = [
        {"tree.depth": 6, "tree.leaf_width": 4, "tree.mirror": 0.0, "tree.placement": "tree", "train.lr": 0.01},
        {"tree.depth": 3, "tree.leaf_width": 1, "tree.mirror": 1.0, "tree.placement": "tree", "train.lr": 0.1},
    ]
    first = search(8, match="total_units", enqueue=wanted, finalists={"count": 0}, race=0)
    run(tmp_path, settings=first)
    found = candidates(tmp_path)
    for name, one in zip(("c001", "c002"), wanted, strict=True):
        assert {key: found[name]["factors"][key] for key in one} == one
    assert [
        c["origin"] for c in json.loads((tmp_path / "results/cheap/plan.json").read_text())["search"]["candidates"]
    ][:3] == ["enqueued", "enqueued", "sampled"]
    run(tmp_path, settings={**first, "name": "later", "enqueue": [], "warm_start": "cheap"})
    url = default_storage(tmp_path)
    later = next(n for n in optuna.get_all_study_names(url) if n.startswith("later-"))
    trials = optuna.load_study(study_name=later, storage=url).trials
    warm = [t for t in trials if t.user_attrs["origin"] == "warm_start"]
    assert {t.user_attrs["arm"] for t in warm} == {"cheap/c001", "cheap/c002", "cheap/c003"}
    assert len(trials) > len(warm)


def test_optuna_loads_the_search_as_documented(tmp_path: Path) -> None:
    """Optuna's own tools, without this package: names, values, settings, and what the search is."""
    settings = search(10, match="total_units", objectives=["bpb", "n_eff_frac"], finalists={"count": 1, "seeds": [9]})
    assert run(tmp_path, settings=settings) == Outcome(done=10, total=10)
    plan = json.loads((tmp_path / "results/cheap/plan.json").read_text())
    study = optuna.load_study(study_name=f"cheap-{plan['space']}", storage=default_storage(tmp_path))
    assert study.metric_names == ["bpb", "n_eff_frac"]
    assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert study.user_attrs["command"] == "ablate study run studies/cheap.yaml"
    assert study.user_attrs["plan"] == plan["hash"]
    found = candidates(tmp_path)
    for trial in study.best_trials:
        mine = found[trial.user_attrs["arm"]]
        assert trial.values[0] == pytest.approx(np.mean(list(mine["bpb"].values())))
        assert set(trial.user_attrs["runs"]) == {str(seed) for seed in mine["bpb"]}
        for key, value in trial.params.items():
            assert mine["factors"][key] == value == trial.user_attrs["settings"][key]
    frame = study.trials_dataframe()
    assert {"values_bpb", "values_n_eff_frac", "params_tree.depth", "user_attrs_arm"} <= set(frame.columns)
    last = optuna.load_study(study_name=f"cheap-{plan['space']}-finalists", storage=default_storage(tmp_path))
    assert [t.user_attrs["kind"] for t in last.trials] == ["finalist"]


def test_a_lost_database_costs_a_search_nothing(tmp_path: Path) -> None:
    settings = search(20, match="total_units", finalists={"count": 2})
    run(tmp_path, settings=settings)
    before = table(tmp_path)
    storage = f"sqlite:///{tmp_path / 'new.db'}"
    assert run(tmp_path, settings=settings, storage=storage) == Outcome(done=20, total=20)
    assert table(tmp_path) == before


def test_the_order_in_which_runs_came_in_decides_nothing() -> None:
    """Balance depends on the seed alone here, so that candidates tie in it, up to the last bit of a mean."""
    rng = random.Random(0)
    seeds = list(range(5))
    balance = {seed: rng.uniform(-1, 0) for seed in seeds}
    scores = {f"c{n:03d}": {s: (0.5 + n / 100 + rng.gauss(0, 0.1), balance[s]) for s in seeds} for n in range(8)}
    orders, outs = set(), set()
    for _ in range(50):
        shuffled = {
            name: dict(rng.sample(list(scores[name].items()), len(seeds)))
            for name in rng.sample(list(scores), len(scores))
        }
        orders.add(tuple(ranked(shuffled)))
        outs.add(beaten_by({0: (0.9, balance[0]), 1: (0.9, balance[1])}, shuffled, seeds, 0.05, 3))
    assert len(orders) == len(outs) == 1
    best = min(scores, key=lambda name: float(np.mean([v for v, _ in scores[name].values()])))
    assert orders.pop()[0] == best, "of candidates that tie in one objective, the best in the other is first"


@pytest.mark.parametrize(
    ("sampler", "objectives"),
    [("tpe", ["bpb"]), ("qmc", ["bpb"]), ("random", ["bpb", "n_eff_frac"])],
    ids=["tpe", "qmc", "random"],
)
@pytest.mark.parametrize(
    "kills", [pytest.param(20, marks=pytest.mark.soak), pytest.param(4, marks=pytest.mark.soak_short)]
)
def test_a_search_killed_at_random_moments_ends_as_if_it_had_not_been(
    tmp_path: Path, kills: int, sampler: str, objectives: list[str]
) -> None:
    settings = search(40, match="total_units", objectives=objectives, sampler=sampler)
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert run(calm, settings=settings) == Outcome(done=40, total=40)
    kill_often(rough, settings, kills, workers=1)
    assert run(rough, settings=settings) == Outcome(done=40, total=40)
    assert table(rough) == table(calm)
    assert finals(rough) == finals(calm)
    assert len(finals(calm)) == 3


@pytest.mark.soak
def test_a_search_of_two_workers_killed_at_random_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    settings = search(40, match="total_units", sampler="random")
    kill_often(tmp_path, settings, 20, workers=2)
    assert run(tmp_path, settings=settings, workers=2) == Outcome(done=40, total=40)
    assert len({(r["arm"], r["seed"]) for r in table(tmp_path).values()}) == 40
    for seeds in seeds_of(tmp_path):
        assert seeds == [0, 1, 2][: len(seeds)]
    done = [t for t in stored(tmp_path).trials if t.state.name != "FAIL"]  # a killed candidate's first entry
    assert len({t.user_attrs["arm"] for t in done}) == len(done) == len(seeds_of(tmp_path))
    assert len(finals(tmp_path)) == 3


def finals(root: Path) -> list[str]:
    return sorted({r["arm"] for r in table(root).values() if r["kind"] == "finalist"})


def kill_often(root: Path, settings: dict[str, Any], kills: int, workers: int) -> None:
    """Start a search again and again; each time SIGKILL it, a part of it, or end it politely, at a random moment."""
    rng = random.Random(0)
    layout = Layout(root, "cheap")
    for left in range(kills, 0, -1):
        process = start(root, workers=workers, run="slow", settings=settings)
        # Some while it starts, the others after it has come a little further, so that the search lasts for all of them.
        step = rng.choice([0, 0, 1, min(3, (40 - len(layout.done())) // left)])
        wanted, end = len(layout.done()) + step, time.monotonic() + 60
        if step == 0:
            end = time.monotonic() + rng.uniform(0.5, 6)
        while process.poll() is None and time.monotonic() < end and (step == 0 or len(layout.done()) < wanted):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            whom = rng.choice(["all", "parent", "polite"])
            process.send_signal(signal.SIGTERM if whom == "polite" else signal.SIGKILL)
            if whom == "all":
                for child in children:
                    os.kill(child.pid, signal.SIGKILL)
            process.communicate(timeout=60)
            _, alive = psutil.wait_procs(children, timeout=30)
            assert not alive, "workers end with their parent"


def test_a_broken_worker_says_why_and_stops_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fault outside any trial: every worker would meet it, so the first one ends the study."""
    settings = search(10)
    layout = Layout(tmp_path, "cheap")
    (layout.state / "locks").mkdir(parents=True)
    lock = layout.state / "locks" / f"{expand(objective.study(**settings)).storage_name}.search.lock"
    lock.mkdir()  # a worker cannot take this lock
    outcome = run(tmp_path, settings=settings, workers=2)
    assert outcome.exit_code == 1
    assert "IsADirectoryError" in outcome.message
    assert "\n" not in outcome.message
    assert "study/" in outcome.message or "filelock" in outcome.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factors": {"tree.depth": {"range": {"low": 2.5, "high": 6}}}}, ["tree.depth", "2.5", "whole number"]),
        ({"factors": {"tree.depth": {"range": {"low": 2, "high": 40}}}}, ["tree.depth is 40", "14"]),
        ({"factors": {"tree.activation": ["gelu", "gelo"]}}, ["tree.activation is 'gelo'"]),
        ({"factors": {"tree.activation": {"range": {"low": 0, "high": 1}}}}, ["tree.activation is 0"]),
        (
            {"match": "total_units", "factors": {"tree.depth": [10, 11], "tree.leaf_width": [1, 2]}},
            ["no candidate", "1276", "nearest"],
        ),
        (
            {"match": "total_units", "factors": {"tree.trees": [1, 2], "tree.leaf_width": [1, 2]}},
            ["tree.leaf_width and tree.trees", "derived"],
        ),
        ({"factors": {"tree.mirror": [0.5, 1], "tree.activation": ["tanh"]}}, ["no candidate", "tanh"]),
        ({"sampler": "cmaes", "objectives": ["bpb", "n_eff_frac"]}, ["'cmaes'", "one objective", "tpe"]),
        ({"sampler": "cmaes", "factors": {"tree.mirror": [0, 1]}}, ["'cmaes'", "two factors"]),
        ({"sampler": "simplex"}, ["sampler", "'simplex'", "tpe"]),
        ({"sampler": {"name": "random", "startup": 4}}, ["startup is 4", "'random'", "tpe"]),
        ({"finalists": {"seeds": [1, 9]}}, ["finalists.seeds", "[1, 9]", "[0, 1, 2]"]),
        ({"budget": {"trials": 9}}, ["budget.trials is 9", "3 finalists"]),
        ({"enqueue": [{"tree.mirror": 0}]}, ["enqueue.0", "tree.depth is missing"]),
        ({"enqueue": [{"tree.wide": 1}]}, ["enqueue.0", "'tree.wide' is not a factor"]),
        ({"design": "factorial", "factors": {"tree.mirror": [0, 1]}, "race": 0.2}, ["race", "'factorial'"]),
    ],
    ids=lambda v: "" if isinstance(v, list) else None,
)
def test_what_cannot_be_searched_is_one_line(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        expand(objective.study(**search(30, **changes)))
    for word in [*words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_numbers_need_no_flag_and_sizes_that_never_fit_are_named() -> None:
    space = Space(objective.study(**search(30, match="total_units")))
    depth = space.distributions["tree.depth"]
    assert isinstance(depth, optuna.distributions.IntDistribution)
    assert (depth.low, depth.high) == (2, 8)
    assert any("tree.depth 9 left out" in note for note in space.notes)
    assert space.derived == "tree.trees"
    share = next(
        re.match(r"(\d+)% of all combinations cannot exist", note) for note in space.notes if "cannot exist" in note
    )
    rng = np.random.default_rng(1)
    impossible = np.mean([space.impossible(space.random(rng)) is not None for _ in range(1000)])
    assert share is not None
    assert float(share[1]) / 100 == pytest.approx(impossible, abs=0.12)
    assert any("1149 to 1403 are allowed" in note for note in space.notes)


@pytest.mark.parametrize(
    "name", ["tpe", "cmaes", pytest.param("gp", marks=pytest.mark.soak_short), "random", "qmc", "nsga2"]
)
def test_a_sampler_proposes_the_same_for_the_same_history_and_nothing_twice(name: str) -> None:
    space = Space(objective.study(**search(30, match="total_units", sampler=name)))
    rng = np.random.default_rng(0)
    history: list[optuna.trial.FrozenTrial] = []
    tried: set[str] = set()
    for number in range(1, 16):
        one = propose(space, ["minimize"], history, number, tried)
        two = propose(space, ["minimize"], history, number, tried)
        assert one is not None
        assert two is not None
        assert one.chosen == two.chosen
        assert space.impossible(one.chosen) is None
        assert key_of(one.chosen) not in tried
        tried.add(key_of(one.chosen))
        distributions = {key: space.distributions[key] for key in one.chosen}
        history.append(
            optuna.trial.create_trial(
                params=dict(one.chosen),
                distributions=distributions,
                value=float(rng.normal()),
                system_attrs=dict(one.system_attrs),
            )
        )


def test_every_level_is_drawn_where_it_can_exist() -> None:
    space = Space(objective.study(**search(30, match="total_units", sampler="random")))
    drawn = space.possible(np.random.default_rng(1), 400, 2000)
    assert {c["tree.depth"] for c in drawn} == set(range(2, 9))
    pairs = set(itertools.product(range(2, 7), [1, 2, 4, 8])) - {
        (d, w)
        for d, w in itertools.product(range(2, 7), [1, 2, 4, 8])
        if space.impossible(
            {"tree.depth": d, "tree.leaf_width": w, "tree.mirror": 0.0, "tree.placement": "tree", "train.lr": 0.01}
        )
    }
    assert {(c["tree.depth"], c["tree.leaf_width"]) for c in drawn} >= pairs


@pytest.mark.soak_short
def test_the_dashboard_reads_the_database_while_it_is_written(tmp_path: Path) -> None:
    """Four workers on SQLite while optuna-dashboard polls: no trial fails, no worker dies."""
    import socket
    import subprocess
    import sys
    import urllib.request

    settings = search(60, objectives=["bpb", "n_eff_frac"])
    process = start(tmp_path, workers=4, run="descend", settings=settings)
    wait_for((tmp_path / "state/optuna.db").exists)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dashboard = subprocess.Popen(
        [sys.executable, "-m", "optuna_dashboard._cli", default_storage(tmp_path), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    polls = 0
    try:
        while process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=30) as answer:
                    assert json.load(answer)
                    polls += 1
            except OSError:
                time.sleep(0.1)  # it is starting
        out = process.communicate(timeout=60)[0]
    finally:
        dashboard.kill()
        dashboard.wait()
    assert process.returncode == 0, out
    assert polls >= 3
    assert "database is locked" not in out
    assert len(table(tmp_path)) == 60
