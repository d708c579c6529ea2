"""The analysis of a search against planted truth: what matters, where it is best, and how lucky the winner was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablate.analysis.findings import compute
from ablate.analysis.frames import load
from ablate.analysis.search.candidates import Noise, adjusted, dominated, probabilities, ranked
from ablate.analysis.search.surrogate import Axis, fit
from ablate.config import ConfigError
from tests.report.synthetic_search import BEST_DEPTH, CONDITIONAL, FACTORS, FRESH, NOISE, RACE, write_search


def study(root: Path, **given: Any) -> dict[str, Any]:
    write_search(root, **given)
    return compute(load("hunt", root))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    root = tmp_path_factory.mktemp("search")
    truth = write_search(root, factors=FACTORS | CONDITIONAL, seed=3)
    return compute(load("hunt", root)), truth


def test_a_search_makes_no_claim(found: Any) -> None:
    data, _ = found
    assert data["findings"] == data["families"] == []
    assert data["pareto"] is None
    assert "makes no claim" in data["search"]["headline"][-1]
    assert "`ablate study promote hunt --top 3`" in data["search"]["headline"][-1]


@pytest.mark.parametrize("spelled", [False, True])
def test_the_base_is_found_among_the_candidates_however_it_is_written(tmp_path: Path, spelled: bool) -> None:
    data = study(tmp_path, factors=FACTORS | CONDITIONAL, count=12, spelled=spelled)
    assert data["search"]["base"] == "c001"
    assert any("the base's settings (c001)" in line for line in data["search"]["headline"])


def test_the_planted_factor_comes_first_and_the_idle_one_explains_nothing(found: Any) -> None:
    data, _ = found
    for objective, factor in (("bpb", "tree.depth"), ("n_eff_frac", "tree.mirror")):
        rows = [r for r in data["importance"] if r["endpoint"] == objective]
        assert rows[0]["factor"] == factor
        assert rows[0]["interval"][0] > 0.6
        assert next(r for r in rows if r["factor"] == "tree.init")["value"] < 0.05
        assert all(r["value"] <= r["total"] + 0.02 for r in rows)


def test_importances_are_the_planted_shares(tmp_path: Path) -> None:
    """Of the variance of bpb over the space, the bowl over depth has 98%, the mirror 1.3%, leaf width 0.4%."""
    rows = [r for r in study(tmp_path, count=120)["importance"] if r["endpoint"] == "bpb"]
    share = {r["factor"]: r["value"] for r in rows}
    assert share["tree.depth"] == pytest.approx(0.982, abs=0.015)
    assert share["tree.mirror"] == pytest.approx(0.013, abs=0.008)
    assert share["tree.leaf_width"] == pytest.approx(0.004, abs=0.005)
    assert sum(share.values()) <= 1.001


def test_partial_dependence_recovers_the_bowl_and_the_rise(found: Any) -> None:
    rows = {(r["factor"], r["objective"]): r for r in found[0]["search"]["dependence"]}
    bowl = rows["tree.depth", "bpb"]
    assert bowl["at"][int(np.argmin(bowl["mean"]))] == BEST_DEPTH
    mean = dict(zip(bowl["at"], bowl["mean"], strict=True))
    assert mean[8] - mean[5] == pytest.approx(0.02 * 9, abs=0.03)
    rise = rows["tree.mirror", "n_eff_frac"]["mean"]
    assert np.all(np.diff(rise[2:-1]) > 0)
    assert rise[-1] - rise[0] == pytest.approx(0.6 * np.tanh(1.5), abs=0.08)
    assert sum(rows["tree.node_mirror", "bpb"]["n"]) < sum(bowl["n"])  # it plays a part for some candidates only


def test_a_map_is_empty_exactly_where_no_candidate_was(found: Any) -> None:
    for r in found[0]["search"]["maps"]:
        assert [[v is None for v in line] for line in r["mean"]] == [[n == 0 for n in line] for line in r["n"]]
        assert sum(map(sum, r["n"])) == 39  # all but the one that diverged
    pairs = {tuple(r["factors"]) for r in found[0]["search"]["maps"]}
    assert ("tree.depth", "tree.mirror") in pairs
    assert len(pairs) == 6


def test_front_probabilities_are_sane(found: Any) -> None:
    data, truth = found
    rows = [r for r in data["search"]["candidates"] if r["rank"] is not None]
    points = np.array([truth[r["arm"]] for r in rows]) * [1, -1]
    far = [r for r, p in zip(rows, points, strict=True) if (points + 10 * NOISE < p).all(1).any()]
    assert far
    assert all(r["probability"] < 0.05 for r in far)
    assert all(r["probability"] > 0.2 for r in rows if r["on_front"])
    chance = np.array([r["probability"] for r in rows])
    true = ~dominated(points)
    assert chance[true].mean() > 5 * chance[~true].mean()


def test_intervals_of_single_seeds_come_from_the_pooled_spread(tmp_path: Path) -> None:
    data = study(tmp_path, count=60, noise=0.01, seed=5)
    sound = [r["racing"]["bpb"] for r in data["search"]["candidates"] if r["rank"] is not None]
    single = [m for m in sound if m["n"] == 1]
    assert single
    assert all(m["interval"] for m in single)
    sd = data["search"]["objectives"][0]["sd"]
    assert 0.005 < sd < 0.02


def test_intervals_cover_the_truth(tmp_path: Path) -> None:
    hit, count = 0, 0
    for seed in range(8):
        truth = write_search(tmp_path, count=25, seed=seed, diverged="none")
        rows = compute(load("hunt", tmp_path))["search"]["candidates"]
        centre = np.mean([r["racing"]["bpb"]["mean"] - truth[r["arm"]][0] for r in rows])  # seeds shift all alike
        for r in rows:
            low, high = r["racing"]["bpb"]["interval"]
            hit += low <= truth[r["arm"]][0] + centre <= high
            count += 1
    assert 0.88 < hit / count < 1


def test_the_fall_of_a_lucky_winner_is_seen(tmp_path: Path) -> None:
    """Many candidates of equal truth and one seed each: the best of them owes all of its lead to luck."""
    data = study(
        tmp_path, count=150, race=(0, 1), objectives=("bpb",), noise=0.02, factors={"tree.init": FACTORS["tree.init"]}
    )
    falls = [f["fall"] for f in data["search"]["finalists"]]
    assert len(falls) == 3
    assert np.mean(falls) > 0.02
    assert any(f["interval"][0] > 0 for f in data["search"]["finalists"])
    assert "worse in bpb than in the race" in " ".join(data["search"]["headline"])
    assert data["search"]["surrogate"][0]["withheld"]  # and nothing is said of a setting that does nothing
    assert data["importance"] == []


def test_finalists_are_compared_on_fresh_seeds_only(found: Any) -> None:
    data, _ = found
    assert data["search"]["finalist_seeds"] == list(FRESH)
    assert data["search"]["race_seeds"] == list(RACE)
    first = data["search"]["candidates"][0]
    assert first["fresh"]["bpb"]["n"] == len(FRESH)
    assert first["racing"]["bpb"]["n"] <= len(RACE)
    best = {f["best"] for f in data["search"]["finalists"] if f["objective"] == "bpb"}
    assert len(best) == 1
    assert all(f["difference"] >= 0 for f in data["search"]["finalists"] if f["objective"] == "bpb" and f["difference"])


def test_a_stopped_candidate_is_corrected_for_its_kind_seed() -> None:
    """Seed 0 is 1 lower for everyone; the candidate that ran nothing else must not look better for it."""
    full = {f"c{i}": {0: 10.0 + i - 1, 1: 10.0 + i + 1} for i in range(3)}
    means = adjusted({**full, "one": {0: 9.5}})
    assert means.mean[:3].tolist() == pytest.approx([10, 11, 12])
    assert means.mean[3] == pytest.approx(10.5)
    assert means.df == 2
    assert means.factor[3] > 1


def test_order_takes_fronts_first_and_balanced_candidates_within_one() -> None:
    points = np.array([[0.0, 1.0], [0.4, 0.4], [1.0, 0.0], [1.0, 1.0]])
    assert dominated(points).tolist() == [False, False, False, True]
    assert ranked(points)[0] == 1
    assert ranked(points)[-1] == 3
    assert ranked(np.array([[3.0], [1.0], [2.0]])) == [1, 2, 0]


def test_probabilities_split_between_equals_and_need_a_noise() -> None:
    rng = np.random.default_rng(0)
    noise = Noise(np.array([[1.0]]), 200, np.array([1.0]), 200)
    two = probabilities(np.array([[0.0], [0.0], [50.0]]), np.ones(3), noise, np.ones(1), rng)
    assert two is not None
    assert two[0] == pytest.approx(0.5, abs=0.06)
    assert two[2] == 0
    unknown = Noise(np.array([[np.nan]]), 0, np.array([np.nan]), 0)
    assert probabilities(np.array([[0.0]]), np.ones(1), unknown, np.ones(1), rng) is None


def test_the_surrogate_predicts_what_it_has_not_seen() -> None:
    rng = np.random.default_rng(1)
    codes = rng.uniform(size=(40, 2))
    y = np.sin(4 * codes[:, 0]) + 0.05 * rng.normal(size=40)
    model = fit([Axis("a", (), True), Axis("b", (), True)], codes, y, np.full(40, 0.05**2))
    assert model.left_out() > 0.9
    assert model.lengths[1] > 2 * model.lengths[0]  # nothing changes along b
    new = rng.uniform(0.1, 0.9, size=(50, 2))
    _, weight, middle = model.weights()
    told = model.centre + model.spread * (model.kernel(new) @ weight + middle)
    assert np.abs(told - np.sin(4 * new[:, 0])).max() < 0.15


def test_searches_are_not_compared_by_their_candidates_names(tmp_path: Path) -> None:
    from ablate.analysis.compare import compare_tables

    write_search(tmp_path, count=5)
    tables = load("hunt", tmp_path)
    with pytest.raises(ConfigError, match="'hunt' is a search"):
        compare_tables(tables, tables)
