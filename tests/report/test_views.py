"""The sections of a report: short functions, the columns of a table of arms, and marks for every kind of trial."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest

from ablate.analysis.frames import load
from ablate.report import views
from ablate.report.draw import name_marks
from ablate.report.parts import View
from ablate.report.style import assign, new
from ablate.report.tables import columns
from ablate.report.views.verdicts import forest
from ablate.results.record import Kind
from tests.report.synthetic import write_study

LONGEST = 70
"""Lines of a function in the report."""


def test_names_beside_marks_do_not_cover_each_other_or_a_mark() -> None:
    figure = new(4, 3)
    ax = figure.subplots()
    points = [(f"c{i:03}", 0.5 + 0.004 * i, 0.5 + 0.003 * (i % 3)) for i in range(9)] + [
        ("alone", 0.0, 0.0),
        ("right", 1.0, 1.0),
    ]
    ax.plot([x for _, x, _ in points], [y for _, _, y in points], "o")
    written = name_marks(figure, ax, points)
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert set(boxes) == set(written)
    assert {"c000", "alone", "right"} <= set(written)
    assert len(written) < len(points), "not all have room"
    marks = ax.transData.transform([(x, y) for _, x, y in points])
    for name, box in boxes.items():
        assert not any(box.overlaps(other) for text, other in boxes.items() if text != name)
        assert not any(box.contains(*mark) for mark in marks)


@pytest.mark.parametrize("path", sorted(Path(views.__file__).parents[1].rglob("*.py")), ids=lambda p: p.stem)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    long = {n.name: n.end_lineno - n.lineno + 1 for n in functions if n.end_lineno}
    assert {name: lines for name, lines in long.items() if lines > LONGEST} == {}


def test_a_table_of_arms_has_the_arm_n_and_runs_by_itself() -> None:
    head = columns(bpb=("bits per byte", ".4f", "lower is better"))
    assert [(c.key, c.title, c.form) for c in head] == [
        ("arm", "arm", "text"),
        ("bpb", "bits per byte", ".4f"),
        ("n", "n", "d"),
        ("runs", "runs", "runs"),
    ]
    assert head[1].help == "lower is better"
    assert [c.key for c in columns("model", n=("seeds", "d"), verdict="verdict")] == ["arm", "n", "verdict", "runs"]
    assert [c.key for c in columns(n=None, runs=None)] == ["arm"]


@pytest.mark.parametrize("kind", [k for k in get_args(Kind) if k != "tune"])
def test_arms_of_every_kind_are_drawn(kind: str, tmp_path: Path) -> None:
    write_study(tmp_path, arms={"frozen": {"tree.router": "frozen"}}, usage=0)
    path = tmp_path / "tables/demo/trials.parquet"
    trials = pl.read_parquet(path)
    trials.with_columns(kind=pl.when(pl.col("kind") == "tune").then("kind").otherwise(pl.lit(kind))).write_parquet(path)
    tables = load("demo", tmp_path)
    arms = tables.trials["arm"].unique(maintain_order=True).to_list()
    assert assign(tables, arms, {a: a for a in arms}).arms.keys() == set(arms)


def test_named_arms_have_marks_of_their_own(tmp_path: Path) -> None:
    arms = {f"arm {i}": {"tree.depth": i + 1} for i in range(14)}
    contrast = {"arm": "arm 0", "endpoint": "bpb", "claim": "matches", "margin": 0.01}
    write_study(tmp_path, arms=arms, contrasts=[contrast], controls=False, tune=False, diverged=False, usage=0)
    order = ["reference", *arms]
    found = assign(load("demo", tmp_path), order, {a: a for a in order}).arms
    assert len({(style.colour, style.marker, style.filled) for style in found.values()}) == 15


def test_every_effect_is_in_the_picture_of_verdicts() -> None:
    def row(effect: float, reach: float) -> dict[str, Any]:
        side = {"arm_label": f"arm {effect}", "reference_label": "reference", "verdict": "supported", "margin": 1.0}
        return {**side, "effect": effect, "interval": [effect - reach, effect + reach]}

    view = View("verdicts", "", "")
    effects = [-3.0, 0.5, 1.0, 24.5]
    forest(view, "kbit_stored", [row(e, 0.2) for e in effects] + [row(0.0, 500.0)])
    low, high = view.figures[0][2].axes[0].get_xlim()
    assert low < -3
    assert 24.5 < high < 100, "one wide interval is cut"
