"""Intervals over the held-out text: their coverage, and where they stand in findings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ablate.analysis.findings import compute
from ablate.analysis.frames import load
from ablate.analysis.text import half_width
from ablate.report.build import build
from ablate.results.columns import WINDOWS_TABLE_SCHEMA
from ablate.results.layout import Layout
from ablate.results.windows import window_table
from tests.report.synthetic import write_study


def test_the_interval_of_a_ratio_covers_the_texts_own_value() -> None:
    rng = np.random.default_rng(0)
    population = rng.gamma(4.0, 60.0, 100_000)
    bits = 0.02 * population + rng.normal(0.0, 12.0, population.size)
    truth = bits.sum() / population.sum()
    held = 0
    for _ in range(2000):
        at = rng.integers(0, population.size, 64)
        half = half_width(bits[at], population[at])
        assert half is not None
        held += abs(bits[at].sum() / population[at].sum() - truth) <= half
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_window_gives_no_interval() -> None:
    assert half_width(np.array([3.0]), np.array([2.0])) is None


def test_an_arms_windows_are_means_over_its_finished_evaluation_trials(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "s")
    layout.results.mkdir(parents=True)
    rows = [("a", "one", "arm", "finished", 3.0), ("b", "one", "arm", "finished", 5.0), ("c", "one", "tune", "finished", 90.0),
            ("d", "one", "arm", "diverged", 90.0), ("e", "two", "arm", "finished", 7.0), ("f", "two", "arm", "finished", None)]  # fmt: skip
    for trial, *_, bits in rows:
        if bits is not None:
            pl.DataFrame({"window": [0, 1], "bytes": [4, 6], "bits": [bits, 2 * bits]}).write_parquet(
                layout.windows(trial)
            )
    trials = pl.DataFrame([row[:4] for row in rows], ["trial", "arm", "kind", "status"], orient="row")
    table = window_table(layout, trials.with_columns(study=pl.lit("s")))
    assert dict(table.schema) == WINDOWS_TABLE_SCHEMA
    assert table.select("arm", "window", "bytes", "bits", "trials").rows() == [
        ("one", 0, 4, 4.0, 2), ("one", 1, 6, 8.0, 2), ("two", 0, 4, 7.0, 1), ("two", 1, 6, 14.0, 1),
    ]  # fmt: skip


def test_findings_and_report_show_it_where_trials_kept_their_windows(tmp_path: Path) -> None:
    options = {"controls": False, "diverged": False, "tune": False, "usage": 0}
    write_study(tmp_path, factors={"tree.mirror": [0.0, 1.0]}, **options)  # type: ignore[arg-type]
    before = compute(load("demo", tmp_path))
    assert not any("over_text" in f for f in before["findings"])
    assert "over text" not in (build("demo", tmp_path) / "report.md").read_text()
    rng = np.random.default_rng(1)
    arms = pl.read_parquet(tmp_path / "tables/demo/trials.parquet")["arm"].unique().sort()
    lengths = rng.integers(200, 400, 40)
    parts = [
        {
            "study": "demo",
            "arm": arm,
            "kind": "arm",
            "window": w,
            "bytes": n,
            "bits": n * 2.0 + rng.normal(0, 9),
            "trials": 3,
        }
        for arm in arms
        for w, n in enumerate(lengths)
    ]
    pl.DataFrame(parts, WINDOWS_TABLE_SCHEMA).write_parquet(tmp_path / "tables/demo/windows.parquet")
    after = compute(load("demo", tmp_path))
    [found] = [f for f in after["findings"] if f["kind"] == "contrast" and f["endpoint"] == "bpb"]
    table = pl.DataFrame(parts, WINDOWS_TABLE_SCHEMA)
    bits = [table.filter(pl.col("arm") == found[side])["bits"].to_numpy() for side in ("arm", "reference")]
    half = half_width(bits[0] - bits[1], lengths)
    assert half is not None
    assert found["over_text"] == {
        "interval": [pytest.approx(found["effect"] - half), pytest.approx(found["effect"] + half)], "windows": 40,
    }  # fmt: skip
    assert "over text ±" in (build("demo", tmp_path) / "report.md").read_text()
