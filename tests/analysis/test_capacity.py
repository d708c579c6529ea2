"""Curves of capacity: which arms make one, where it passes one half, and the section that shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from ablate.analysis.capacity import capacity
from ablate.analysis.findings import compute
from ablate.analysis.frames import load
from ablate.config.endpoints import ACCURACY, KBIT_STORED
from ablate.report.build import build
from ablate.results.columns import TRIALS_SCHEMA
from tests.report.synthetic import write_study

COUNTS = (1024, 2048, 4096)
SLOPE = {"plain": 0.4, "frozen": 0.1}
"""Accuracy lost at each doubling of the number of facts."""


def accuracy(kind: str, count: int, seed: int) -> float:
    return 0.9 - SLOPE[kind] * math.log2(count / 1024) + 0.02 * seed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two layers at three numbers of facts; the arm `alone` has a router of its own at one number only."""
    root = tmp_path_factory.mktemp("capacity")
    arms: dict[str, dict[str, Any]] = {"alone": {"tree.router": "hash"}}
    for kind, settings in {"plain": {}, "frozen": {"tree.router": "frozen"}}.items():
        arms |= {f"{kind}, N {n}": {"task.facts": n, **settings} for n in COUNTS}
    contrasts = [
        {
            "arm": "frozen, N 2048",
            "reference": "plain, N 2048",
            "claim": "higher",
            "margin": 1.0,
            "endpoint": "kbit_stored",
        }
    ]
    write_study(root, arms=arms, contrasts=contrasts, controls=True, tune=False, diverged=False, usage=0, seeds=(0, 1))
    file = root / "studies/demo.yaml"
    study = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**study, "preset": "facts", "margin": 1}))
    path = root / "tables/demo/trials.parquet"
    rows = pl.read_parquet(path).to_dicts()
    for row in rows:
        config = json.loads(row["config"])
        settings = arms.get(row["arm"], {})
        count = int(settings.get("task.facts", 8192))
        config["task"] = {"kind": "facts", "facts": count}
        config["tree"] = {"router": settings.get("tree.router", "tied")}
        config["model"] = {"feedforward": "dense" if row["kind"] == "control" else "tree"}
        config["init_seed"] = config["data_seed"] = row["seed"]
        known = accuracy(row["arm"].partition(",")[0], count, row["seed"]) if "," in row["arm"] else 0.2
        row |= {
            "config": json.dumps(config),
            "bpb": None,
            ACCURACY.name: known,
            KBIT_STORED.name: 0.006 * count * known,
        }
        row[KBIT_STORED.start] = 0.0
    schema = {**TRIALS_SCHEMA, **{k: v for k, v in pl.read_parquet_schema(path).items() if k not in TRIALS_SCHEMA}}
    pl.DataFrame(rows, schema=schema).write_parquet(path)
    return root


def test_arms_that_differ_in_the_number_of_facts_alone_are_one_curve(root: Path) -> None:
    tables = load("demo", root)
    names = {arm: arm for arm in tables.trials["arm"].unique()}
    found = {curve["curve"]: curve for curve in capacity(tables, tables.trials, names)}
    assert found.keys() == {"plain", "frozen"}, "`alone` has one number of facts"
    plain, frozen = found["plain"], found["frozen"]
    assert [p["facts"] for p in plain["points"]] == [1024, 2048, 4096, 8192]
    assert plain["points"][-1]["arm"] == "reference", "which has the preset's number of facts"
    [middle] = [p for p in plain["points"] if p["facts"] == 2048]
    assert middle["arm"] == "plain, N 2048"
    stored = [0.006 * 2048 * accuracy("plain", 2048, s) for s in (0, 1)]
    assert middle[KBIT_STORED.name] == pytest.approx(sum(stored) / 2)
    assert (middle["low"], middle["high"], middle["n"]) == (pytest.approx(stored[0]), pytest.approx(stored[1]), 2)
    units = tables.trials.filter(pl.col("arm") == "plain, N 2048")["total_units"][0]
    assert middle["bits_per_unit"] == pytest.approx(1000 * sum(stored) / 2 / units)
    # 0.9 - 0.4 x + 0.02 seed = 0.5 at x doublings.
    halves = [1024 * 2 ** ((0.4 + 0.02 * s) / 0.4) for s in (0, 1)]
    assert plain["half"] == {
        "mean": pytest.approx(sum(halves) / 2),
        "low": pytest.approx(halves[0]),
        "high": pytest.approx(halves[1]),
        "n": 2,
    }
    assert frozen["half"] is None, "0.7 is its lowest accuracy"


def test_the_report_has_a_section_on_capacity_and_studies_of_text_have_none(root: Path, tmp_path: Path) -> None:
    build("demo", root)
    text = (root / "out/demo/report.md").read_text()
    assert "Facts of which half are known: plain" in text
    assert "Accuracy does not pass one half within the numbers tried: frozen." in text
    assert {p.stem for p in (root / "out/demo/figures").glob("*.svg")} >= {"capacity", "capacity_balance"}
    write_study(tmp_path, usage=0)
    assert capacity(load("demo", tmp_path), load("demo", tmp_path).trials, {}) == []


def test_only_trees_that_learn_as_many_facts_as_the_controls_are_compared_with_them(root: Path) -> None:
    data = compute(load("demo", root))
    compared = {f["arm"] for f in data["findings"] if f["family"] == "dense"}
    assert compared == {"reference", "alone"}
    assert {r["arm"] for r in data["recovered"]} == {"reference", "alone"}
