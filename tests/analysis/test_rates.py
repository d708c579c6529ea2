"""What findings say about learning rates: the rule behind each verdict, bounds, and other rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ablate.analysis.findings import compute
from ablate.analysis.frames import load
from ablate.analysis.rates import withhold_restored
from ablate.report.build import build
from ablate.results.columns import RATES_SCHEMA
from ablate.results.rates import rate_table
from tests.report.synthetic import write_study

EVEN: dict[str, dict[str, Any]] = {"even": {"tree.mirror": 1.0}}
CLAIMS = [
    {"arm": "even", "endpoint": "bpb", "claim": "matches", "margin": 0.03},
    {"arm": "even", "endpoint": "n_eff_frac", "claim": "higher", "margin": 0.05},
]


def study(root: Path, tune: bool | str, capped: str = "") -> dict[str, Any]:
    """Findings of a study whose arms match in quality; of a capped arm, the largest rate tried is the best."""
    options: dict[str, Any] = {"controls": False, "diverged": False, "usage": 0, "seeds": tuple(range(8))}
    write_study(root, arms=EVEN, contrasts=CLAIMS, tune=tune, **options)
    path = root / "tables/demo/trials.parquet"
    better = (pl.col("kind") == "tune") & (pl.col("arm") == capped) & (pl.col("lr") > 5e-3)
    poor = 0.2 * ((pl.col("kind") == "tune") & (pl.col("lr") != 3e-3))
    pl.read_parquet(path).with_columns(bpb=pl.col("bpb") + poor - 0.5 * better).write_parquet(path)
    return compute(load("demo", root))


def claim(data: dict[str, Any], endpoint: str) -> dict[str, Any]:
    [found] = [f for f in data["findings"] if f["endpoint"] == endpoint]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("tune", ["bracket", True], ids=["bracket", "grid"])
def test_arms_with_optima_inside_may_match(tmp_path: Path, tune: bool | str) -> None:
    data = study(tmp_path, tune)
    assert claim(data, "bpb")["verdict"] == "supported"
    assert claim(data, "bpb")["rates"]["bound"] == []


@pytest.mark.parametrize("tune", ["bracket", True], ids=["bracket", "grid"])
@pytest.mark.parametrize("capped", ["even", "reference"])
def test_a_capped_arm_cannot_earn_matches(tmp_path: Path, tune: bool | str, capped: str) -> None:
    data = study(tmp_path, tune, capped)
    found = claim(data, "bpb")
    assert (found["verdict"], found["rates"]["bound"]) == ("inconclusive", [capped])
    assert found["reasons"] == [f"learning rate of {capped}: a bound, not an optimum"]
    assert found["text"].startswith("bpb of even is within 0.03 of reference: inconclusive")
    assert claim(data, "n_eff_frac")["verdict"] == "supported", "balance does not rest on the best rate"
    assert data["summary"]["supported"] == 1


def test_whether_a_capped_arm_restores_balance_stays_open() -> None:
    def answers(*capped: str) -> list[dict[str, Any]]:
        arms: dict[str, list[bool | None]] = {"good": [True, False], "poor": [False, False], "reference": [True, True]}
        records: list[dict[str, Any]] = [
            {"arm": arm, "restored": held[0], "at_threshold": {"0.8": held[0], "0.9": held[1]}}
            for arm, held in arms.items()
        ]
        withhold_restored(records, "reference", [{"arm": arm, "interior": arm not in capped} for arm in arms])
        return [{"held": [r["restored"], *r["at_threshold"].values()]} | r for r in records]

    assert [r["held"] for r in answers()] == [[True, True, False], [False] * 3, [True] * 3]
    for capped in ("good", "reference"):
        good, poor, reference = answers(capped)
        assert good["held"] == [None, None, False]
        assert good["rate_is_bound"]
        assert (poor["held"], reference["held"]) == ([False] * 3, [True] * 3)


def test_claims_are_given_at_a_shared_rate_and_at_both_neighbours(tmp_path: Path) -> None:
    data = study(tmp_path, "bracket")
    assert data["rate_rule"] == "bracket"
    trials = pl.read_parquet(tmp_path / "tables/demo/trials.parquet").filter(pl.col("kind") == "tune")
    for endpoint in ("bpb", "n_eff_frac"):
        elsewhere = {e["at"]: e for e in claim(data, endpoint)["rates"]["elsewhere"]}
        assert {at: (e["arm"], e["reference"], e["n"]) for at, e in elsewhere.items()} == {
            "shared": (3e-3, 3e-3, 3),
            "below": (1.5e-3, 1.5e-3, 3),
            "above": (6e-3, 6e-3, 3),
        }
        for e in elsewhere.values():
            mean = {
                arm: trials.filter((pl.col("arm") == arm) & (pl.col("lr") == e["arm"]))[endpoint].to_numpy().mean()
                for arm in ("even", "reference")
            }
            assert e["effect"] == pytest.approx(mean["even"] - mean["reference"])


def test_one_rate_for_all_is_said(tmp_path: Path) -> None:
    data = study(tmp_path, tune=False)
    assert {f["rates"]["rule"] for f in data["findings"]} == {data["rate_rule"]} == {"none"}
    page = (build("demo", tmp_path) / "report.md").read_text()
    assert "One learning rate for all arms (`tune: none`)" in page
    assert "one: 0.003" in page


def test_the_report_shows_rates_bounds_and_claims_at_other_rates(tmp_path: Path) -> None:
    study(tmp_path, "bracket", "even")
    report = build("demo", tmp_path)
    page = (report / "report.md").read_text()
    assert "A bound, not an optimum (the best rate is the smallest or largest tried): even." in page
    assert "own best: 0.003 (a bound)" in page
    shown = pl.read_csv(report / "tables/learning_rates.csv")
    assert {"lr", "bpb", "n_eff_frac", "is_chosen", "bound"} <= set(shown.columns)
    assert (report / "figures/learning_rates.png").stat().st_size > 5000
    assert (report / "tables/other_rates.csv").exists()


def test_the_table_of_rates_says_what_each_round_asked(tmp_path: Path) -> None:
    study(tmp_path, "bracket")
    trials = pl.read_parquet(tmp_path / "tables/demo/trials.parquet")
    tried = [{"lr": lr, "round": place} for lr, place in ((1.5e-3, 0), (3e-3, 0), (6e-3, 1))]
    table = rate_table(trials, {"tuned": {"even": {"lr": 6e-3, "at_edge": True, "tried": tried}}})
    assert dict(table.schema) == RATES_SCHEMA
    even = table.filter(pl.col("arm") == "even")
    assert even.select("lr", "round", "chosen", "bound", "trials").rows() == [
        (1.5e-3, 0, False, False, 3), (3e-3, 0, False, False, 3), (6e-3, 1, True, True, 3),
    ]  # fmt: skip
    other = table.filter(pl.col("arm") == "reference")
    assert other["round"].to_list() == [None] * 3
    assert not json.loads((tmp_path / "results/demo/plan.json").read_text())["tuned"], (
        "the rounds are those given above"
    )
