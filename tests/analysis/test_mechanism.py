"""Who moved the nodes, and what the named contrasts say together: against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ablate.analysis.arms import outcomes
from ablate.analysis.findings import compute
from ablate.analysis.frames import load
from ablate.analysis.mechanism import mechanism, per_trial
from ablate.balance.usage import MOTION_SCHEMA
from ablate.report.build import build
from tests.report.synthetic import write_study

PLACE: dict[str, pl.DataType] = {"study": pl.String(), "trial": pl.String(), "arm": pl.String(), "seed": pl.Int64()}


def motion(nodes: list[dict[str, Any]], **place: Any) -> pl.DataFrame:
    blank = {"step": 60, "since": 0, "layer": 0, "tree": 0, "level": 0, "index": 0, "router_rms": 0.0, "drift_rms": 0.0}
    rows = [{"study": "demo", **place, **blank, "change": n["router"] + n["drift"], **n} for n in nodes]
    return pl.DataFrame(rows, schema=PLACE | MOTION_SCHEMA, strict=False)


def test_pushes_are_sums_over_tokens_in_units_of_the_spread() -> None:
    nodes = [
        {"tokens": 300, "right": 0.9, "right_after": 0.8, "sd": 1.0, "router": 0.2, "drift": -0.5},
        {"tokens": 100, "right": 0.2, "right_after": 0.1, "sd": 2.0, "router": 0.4, "drift": 0.3},
        {"tokens": 59, "right": 1.0, "right_after": 1.0, "sd": 1.0, "router": 9.0, "drift": 9.0},  # too few tokens
        {"tokens": 400, "right": 1.0, "right_after": 1.0, "sd": 0.0, "router": 9.0, "drift": 9.0},  # does not spread
    ]
    [row] = per_trial(motion(nodes, trial="a", arm="own", seed=0).lazy()).to_dicts()
    assert row["right_excess"] == pytest.approx((300 * 0.6 + 100 * -0.8) / 400)
    assert row["imbalance"] == pytest.approx((300 * 0.6 + 100 * 0.8) / 400)
    assert row["router_right"] == pytest.approx((300 * 0.2 + 100 * 0.4) / 500)
    assert row["drift_right"] == pytest.approx((300 * -0.5 + 100 * 0.3) / 500)
    assert row["router_fuller"] == pytest.approx((300 * 0.2 - 100 * 0.4) / 500)
    assert row["drift_fuller"] == pytest.approx((300 * -0.5 - 100 * 0.3) / 500)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    contrasts = [
        {"arm": "flat", "endpoint": "dead_frac", "claim": "lower", "margin": 0.05},
        {"arm": "flip", "endpoint": "dead_frac", "claim": "matches", "margin": 0.05},
        {"arm": "even", "endpoint": "dead_frac", "claim": "lower", "margin": 0.05},
    ]
    arms: dict[str, dict[str, Any]] = {
        "flat": {"tree.node_backward": "flat"},
        "flip": {"tree.node_backward": "flip"},
        "even": {"tree.mirror": 1},  # another forward pass: no test of the backward
    }
    write_study(
        tmp_path, arms=arms, contrasts=contrasts, seeds=(0, 1, 2, 3, 4), controls=False, tune=False, diverged=False
    )
    return tmp_path


def told(root: Path, flat: float) -> dict[str, Any]:
    """The mechanism after the flat arm's dead leaves were set to `flat` below the reference's .4, give or take .01."""
    path, noise = root / "tables/demo/trials.parquet", np.random.default_rng(0).normal(0, 0.01, 100)
    trials = pl.read_parquet(path).with_row_index("row")
    dead = 0.4 - flat * (pl.col("arm") == "flat") + pl.col("row").map_elements(lambda i: noise[i], pl.Float64)
    trials.with_columns(dead_frac=dead).drop("row").write_parquet(path)
    found: dict[str, Any] = compute(load("demo", root))["mechanism"]
    return found


@pytest.mark.parametrize(("flat", "verdict"), [(0.2, "supported"), (-0.2, "refuted"), (0.0, "refuted")])
def test_the_verdict_rests_on_directed_contrasts_of_one_forward_pass(root: Path, flat: float, verdict: str) -> None:
    found = told(root, flat)
    assert found["rests_on"] == ["confirm/flat/reference/dead_frac"]
    assert found["verdict"] == verdict


def test_a_study_of_the_forward_pass_alone_has_no_mechanism(tmp_path: Path) -> None:
    write_study(tmp_path, tune=False)
    tables = load("demo", tmp_path)
    assert mechanism(tables, outcomes(tables), []) is None


def test_the_view_shows_pushes_and_directions(root: Path) -> None:
    trials = pl.read_parquet(root / "tables/demo/trials.parquet")
    frames = [
        motion(
            [{"tokens": 200, "right": 0.6, "right_after": 0.3 + 0.01 * seed, "sd": 1.0, "router": -0.2, "drift": 0.1}],
            trial=trial, arm=arm, seed=seed,
        ).with_columns(step=pl.lit(step, pl.Int32))
        for trial, arm, seed in trials.select("trial", "arm", "seed").iter_rows()
        for step in (60, 120)
    ]  # fmt: skip
    pl.concat(frames).write_parquet(root / "tables/demo/motion.parquet")
    folder = build("demo", root)
    text = (folder / "report.md").read_text()
    assert "flip: 2r - 1 is -0.360 at the end (95% interval" in text
    assert "towards the fuller side moved the router -0.200, drift +0.100 sd." in text
    assert (folder / "figures/mechanism.png").stat().st_size > 5000
    pushes = pl.read_csv(folder / "tables/mechanism_pushes.csv")
    assert pushes.height == 4 * 2
    assert pushes["router_right"].to_list() == pytest.approx([-0.2] * 8)
