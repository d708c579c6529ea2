"""What a `confirm` asks, in which family, and when: planted arms through outcomes, plan, findings and restored."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ablate.analysis import arms
from ablate.analysis.families import judge_all, judged
from ablate.analysis.frames import Tables, load
from ablate.analysis.restored import restored
from ablate.analysis.verdicts import Runs
from ablate.config import parse
from ablate.config.study import Study
from ablate.results.kept import KEPT, STUDY, table
from ablate.results.layout import HISTORY, TRIALS

REPORTS = Path(__file__).parents[2] / "reports"


@cache
def confirm() -> Tables:
    """Return the published tables of `confirm`, without its controls."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for source, target in (
            (STUDY, "studies/confirm.yaml"),
            (TRIALS, f"tables/confirm/{TRIALS}"),
            (HISTORY, f"tables/confirm/{HISTORY}"),
        ):
            (place / target).parent.mkdir(parents=True, exist_ok=True)
            (place / target).write_bytes(table(REPORTS / "confirm" / KEPT, source).read())
        tables = load("confirm", place)
    trials = tables.trials.filter(pl.col("kind") == "arm")
    contrasts = [c for c in tables.study.contrasts if c.reference == "reference"]
    return replace(
        tables, trials=trials, study=tables.study.model_copy(update={"contrasts": contrasts, "controls": []})
    )


def planted(rng: np.random.Generator, *, claims: bool = True, **effects: dict[str, float]) -> Tables:
    """Return those tables with endpoints drawn: noise of each run over an effect that runs of one seed share."""
    tables = confirm()
    names, seeds = tables.trials["arm"].to_list(), tables.trials["seed"].to_numpy()
    shared = rng.normal(0, 1, (2, seeds.max() + 1))
    n_eff = 0.5 + 0.03 * rng.normal(size=len(names)) + 0.03 * shared[0, seeds]
    bpb = 2.0 + 0.01 * rng.normal(size=len(names)) + 0.02 * shared[1, seeds]
    n_eff += np.array([effects.get("n_eff_frac", {}).get(name, 0.0) for name in names])
    bpb += np.array([effects.get("bpb", {}).get(name, 0.0) for name in names])
    lost = -np.log2(n_eff) / 6
    columns = {"n_eff_frac": n_eff, "bits_lost": lost, "bpb": bpb, "dead_frac": 0 * lost, "collapse": 0 * lost}
    trials = tables.trials.with_columns(pl.Series(k, v) for k, v in columns.items())
    study = tables.study if claims else tables.study.model_copy(update={"contrasts": []})
    return replace(tables, trials=trials, study=study)


def judge(tables: Tables) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    frame = arms.outcomes(tables)
    runs = Runs.of(frame, list(judged(tables.study)))
    found, families = judge_all(tables, runs, None, np.random.default_rng(0))
    return found, families, restored(tables, runs, frame, "reference")


@pytest.mark.parametrize("studies", [pytest.param(10, id="10"), pytest.param(1500, id="1500", marks=pytest.mark.soak)])
@pytest.mark.parametrize("claims", [True, False])
def test_identical_arms_give_no_more_false_claims_than_promised(studies: int, claims: bool) -> None:
    rng = np.random.default_rng([11, claims])
    hits = {"holm": 0, "bh": 0}
    covered: list[bool] = []
    for _ in range(studies):
        found, families, _ = judge(planted(rng, claims=claims))
        for method in {f["adjustment"] for f in families}:
            wrong = [
                f
                for f in found
                if f["adjustment"] == method and f["claim"] != "matches" and f["verdict"] == "supported"
            ]
            hits[method] += bool(wrong)
        covered += [f["interval"][0] <= 0 <= f["interval"][1] for f in found]
    rate = hits["holm" if claims else "bh"] / studies
    print(f"A/A, {'named' if claims else 'exploratory'}: any false claim {rate:.1%}, coverage {np.mean(covered):.1%}")
    assert rate <= (0.056 if studies >= 1500 else 0.3)


def test_the_price_of_an_arm_is_asked_once_its_balance_is_shown() -> None:
    tables = planted(np.random.default_rng(1), n_eff_frac={"combination": 0.4}, bpb={"combination": 0.1})
    found, families, told = judge(tables)
    sizes = {f["family"]: f["size"] for f in families}
    assert sizes == {"confirm": 8, "bits": 8, "cost": 1}
    cost = {f["arm"]: f for f in found if f["family"] == "cost"}
    assert cost["combination"]["verdict"] == "refuted"
    assert cost["even mirror"]["reasons"] == ["not asked: the claim on n_eff_frac is not supported"]
    assert cost["even mirror"]["p_adjusted"] is None
    # One arm is balanced, so its quality is one test, and no other arm's counts.
    balanced = {r["arm"]: r for r in told if r["balanced"]}
    assert set(balanced) == {"combination"}
    assert balanced["combination"]["family_size"] == 1
    assert balanced["combination"]["restored"] is False


def test_restored_is_decided_by_the_end_of_an_interval() -> None:
    rng = np.random.default_rng(2)
    arm = {"combination": 0.312}  # 0.81 on average: over 0.8, but not with its whole interval at this spread
    found, _, told = judge(planted(rng, n_eff_frac=arm))
    record = next(r for r in told if r["arm"] == "combination")
    assert record["n_eff_6"] > 0.8 > record["n_eff_6_bound"]
    assert record["balanced"] is False
    assert next(f for f in found if f["arm"] == "combination" and f["family"] == "bits")["verdict"] == "supported"


def test_bits_lost_comes_first_where_depth_varies() -> None:
    study = confirm().study
    assert list(judged(study)) == ["bpb", "bits_lost", "n_eff_frac"]
    assert judged(study)["bits_lost"] == pytest.approx(0.015, abs=5e-5)
    flat: dict[str, Any] = {"name": "flat", "factors": {"tree.mirror": [0, 1]}}
    assert list(judged(parse(Study, flat, where="study"))) == ["bpb", "n_eff_frac"]
