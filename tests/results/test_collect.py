"""Tables are made from results alone: same results, same bytes; types, order and derived columns as the schema says."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ablate.balance import metrics, usage
from ablate.config import ConfigError
from ablate.evaluation.scores import Score
from ablate.results.collect import collect
from ablate.results.columns import BALANCE, HISTORY_SCHEMA, TRIALS_SCHEMA, USAGE_TABLE_SCHEMA
from ablate.results.layout import Layout
from ablate.results.record import Record, leaf_deaths, load_record, save_record
from ablate.study.designs import Plan, expand
from ablate.study.records import save_plan
from ablate.training.result import Evaluation
from tests.study import objective

LEAVES = 4


def counts(step: int) -> np.ndarray:
    """Leaf counts [1, 1, 4]: leaf 0 born dead, leaf 1 dies and stays dead, leaf 2 dies and comes back."""
    return np.array({0: [[[0, 100, 100, 100]]], 5: [[[0, 0, 0, 300]]], 10: [[[0, 0, 100, 200]]]}[step])


def record(plan: Plan, index: int, table: Path) -> Record:
    planned = plan.trials[index]
    tree = planned.trial.model.feedforward == "tree"
    rows = [usage.rows(step, "held_out", counts(step)) for step in (0, 5, 10)] if tree else []
    pl.concat(rows or [pl.DataFrame(schema=usage.USAGE_SCHEMA)]).write_parquet(table)
    history = [
        Evaluation(
            step=step,
            tokens=step * 100,
            bpb=4.0 - step / 10 if index != 1 or step < 10 else None,
            train_loss=None if step == 0 else 1.5,
            lr=0.1,
            seconds=step / 2,
            balance=metrics.summary(counts(step)) if tree else {},
        )
        for step in (0, 5, 10)
    ]
    return Record(
        config=planned.trial,
        status="diverged" if index == 1 else "finished",
        history=history,
        cost=objective.COST,
        provenance=objective.PROVENANCE,
        tokens_per_second=5.0,
        seconds=7.0,
        study=plan.study.name,
        space=plan.space,
        trial=planned.hash,
        arm=planned.arm,
        kind=planned.kind,
        seed=planned.seed,
        factors=dict(planned.factors),
        run_id="r1",
        leaves=leaf_deaths(table),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    plan = expand(objective.study(controls=["total"], arms={"late": {"tree.node_mirror": 0.5}}))
    layout = Layout(tmp_path, "cheap")
    save_plan(layout, plan)
    for index in range(len(plan.trials)):
        save_record(layout, record(plan, index, tmp_path / "usage.parquet"), tmp_path)
    return tmp_path


def test_tables_have_the_schema_and_the_plans_order(root: Path) -> None:
    folder = collect("cheap", root)
    plan = expand(objective.study(controls=["total"], arms={"late": {"tree.node_mirror": 0.5}}))
    trials = pl.read_parquet(folder / "trials.parquet")
    factors = {
        "factor.tree.mirror": pl.Float64,
        "factor.tree.placement": pl.String,
        "factor.tree.node_mirror": pl.Float64,
    }
    assert dict(trials.schema) == TRIALS_SCHEMA | factors
    assert trials["trial"].to_list() == [t.hash for t in plan.trials]
    history = pl.read_parquet(folder / "history.parquet")
    assert dict(history.schema) == HISTORY_SCHEMA
    assert history["flip_rate"].null_count() == history.height  # no tree table here; tests/e2e has real ones
    assert history["step"].to_list() == [0, 5, 10] * len(plan.trials)
    table = pl.read_parquet(folder / "usage.parquet")
    assert dict(table.schema) == USAGE_TABLE_SCHEMA
    assert {name for name in metrics.summary(counts(0)) if "/" not in name} == set(BALANCE)
    one = table.filter(pl.col("trial") == plan.trials[0].hash).select(list(usage.USAGE_SCHEMA))
    assert usage.counts_from(one)[:, 0, 0].tolist() == [counts(s)[0, 0].tolist() for s in (0, 5, 10)]


def test_scores_are_columns_and_absent_where_nothing_was_asked(root: Path) -> None:
    plan = expand(objective.study(controls=["total"], arms={"late": {"tree.node_mirror": 0.5}}))
    layout = Layout(root, "cheap")
    path = layout.record(plan.trials[1].hash)
    score = Score(
        task="t", shots=0, metric="acc", value=0.5, error=0.1, items=9, documents=None, chance=0.25, unigram=None,
        over_unigram=None, over_unigram_error=None, truncated=0.0,
    )  # fmt: skip
    path.write_text(load_record(path).model_copy(update={"scores": [score]}).model_dump_json())
    trials = pl.read_parquet(collect("cheap", root) / "trials.parquet")
    assert [c for c in trials.columns if c.startswith("qa/")] == [
        "qa/t/0shot/acc", "qa/t/0shot/acc/error", "qa/t/0shot/acc/chance",
    ]  # fmt: skip
    assert trials["qa/t/0shot/acc"].to_list() == [None, 0.5, *[None] * (trials.height - 2)]


def test_birth_collapse_and_pruning_are_told_apart(root: Path) -> None:
    row = pl.read_parquet(collect("cheap", root) / "trials.parquet").row(0, named=True)
    assert (row["born_dead_frac"], row["pruned_frac"], row["revived_frac"], row["never_alive_frac"]) == (
        0.25,
        0.25,
        0.25,
        0.25,
    )
    assert (row["leaves_dead_start"], row["leaves_dead_end"]) == (1, 2)
    assert (row["dead_frac_start"], row["dead_frac_max"], row["dead_frac"]) == (0.25, 0.75, 0.5)
    assert row["n_eff_frac_start"] == pytest.approx(0.75)
    assert row["n_eff_frac_min"] == pytest.approx(0.25)


def test_what_was_not_measured_is_null(root: Path) -> None:
    trials = pl.read_parquet(collect("cheap", root) / "trials.parquet")
    control = trials.filter(pl.col("kind") == "control").row(0, named=True)
    assert all(control[name] is None for name in (*BALANCE, "pruned_frac", "leaves_dead_end", "factor.tree.mirror"))
    diverged = trials.filter(pl.col("status") == "diverged").row(0, named=True)
    assert (diverged["bpb"], diverged["bpb_start"]) == (None, 4.0)


def test_same_results_same_bytes_wherever_they_lie(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(root / "results", other / "results")

    def digests(folder: Path) -> list[str]:
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())]

    assert digests(collect("cheap", root)) == digests(collect("cheap", other)) == digests(collect("cheap", root))


def test_results_of_an_earlier_plan_are_left_out(root: Path) -> None:
    save_plan(Layout(root, "cheap"), expand(objective.study(seeds=[1])))
    trials = pl.read_parquet(collect("cheap", root) / "trials.parquet")
    assert trials["seed"].to_list() == [1] * 4


@pytest.mark.parametrize("damage", ["none", "empty", "half", "other"])
def test_missing_and_damaged_results_are_one_line(root: Path, damage: str) -> None:
    layout = Layout(root, "cheap")
    path = layout.record(sorted(layout.done())[0])
    text = path.read_text()
    path.write_text({"none": text, "empty": "", "half": text[: len(text) // 2], "other": "[1]"}[damage])
    name = "nowhere" if damage == "none" else "cheap"
    with pytest.raises(ConfigError) as error:
        collect(name, root)
    assert ("no results" in str(error.value)) if damage == "none" else (str(path) in str(error.value))
    assert "\n" not in str(error.value)
