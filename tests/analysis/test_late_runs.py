"""Heavy tails: an interval of paired differences that holds when some runs learn late, and what it may call equal.

The rows are those of an audit of the published findings: planted truths, and resamples of the real spreads. Under `soak`
20,000 draws a row, for n of 3, 5, 8, 10 and 16, every figure printed (`pytest -s`); else 1,000 for n of 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from ablate.analysis import contrasts, power, ranks, tails
from ablate.results.kept import KEPT, table
from ablate.results.layout import TRIALS

REPORTS = Path(__file__).parents[2] / "reports"
SD = 0.01  # of one run; a paired difference has sqrt 2 of it
Draw = Callable[[np.random.Generator, int, int], tuple[Any, Any]]
DRAWS = [
    pytest.param(1000, (8,), id="1000"),
    pytest.param(20_000, (3, 5, 8, 10, 16), id="20000", marks=pytest.mark.soak),
]


def planted(share: float, late: float, *, both: bool = False, shift: float = 0.0) -> Draw:
    """Runs of an arm [draws, n] of which a share are late, and of its reference."""

    def draw(rng: np.random.Generator, draws: int, n: int) -> tuple[Any, Any]:
        arm, reference = rng.normal(shift, SD, (draws, n)), rng.normal(0, SD, (draws, n))
        arm += late * (rng.random((draws, n)) < share)
        return arm, reference + (late * (rng.random((draws, n)) < share) if both else 0.0)

    return draw


def resampled(study: str, arm: str) -> Draw:
    """Pairs drawn with replacement from a published study's."""
    rows = pl.read_parquet(table(REPORTS / study / KEPT, TRIALS)).filter(pl.col("kind") == "arm").sort("seed")
    own, other = (rows.filter(pl.col("arm") == name)["bpb"].to_numpy() for name in (arm, "reference"))

    def draw(rng: np.random.Generator, draws: int, n: int) -> tuple[Any, Any]:
        at = rng.integers(len(own), size=(draws, n))
        return own[at], other[at]

    return draw


ROWS: dict[str, Draw] = {
    "Gaussian": planted(0, 0),
    "late 1/6 +0.15, both arms": planted(1 / 6, 0.15, both=True),
    "late 1/6 +0.15, one arm": planted(1 / 6, 0.15),
    "late 3/32 +0.08, one arm": planted(3 / 32, 0.08),
    "resampled: frozen router (confirm)": resampled("confirm", "frozen router"),
    "resampled: shallow trees (confirm)": resampled("confirm", "shallow trees"),
    "resampled: combination (restored)": resampled("restored", "combination"),
    "resampled: centred routing (restored)": resampled("restored", "centred routing"),
    "resampled: small combination (equal_active)": resampled("equal_active", "small combination"),
}
Bounds = tuple[Any, Any]


def mean_t(d: Any) -> Bounds:
    e = contrasts.paired(d)
    return e.low, e.high


def rank(d: Any) -> Bounds:
    e = ranks.signed_rank(d)
    return e.low, e.high


def yuen(d: Any) -> Bounds:
    """Return the t interval of the 20% trimmed mean (Yuen 1974)."""
    n, x = d.shape[-1], np.sort(d, axis=-1)
    cut = int(tails.TRIM * n)
    kept = n - 2 * cut
    spread = np.clip(x, x[:, cut : cut + 1], x[:, n - cut - 1 : n - cut]).std(axis=-1, ddof=1)
    half = stats.t.ppf(0.975, kept - 1) * spread * np.sqrt((n - 1) / (kept * (kept - 1)))
    middle = x[:, cut : n - cut].mean(axis=-1)
    return middle - half, middle + half


def bootstrap_t(d: Any) -> Bounds:
    """Return the studentised bootstrap interval of the mean, of the first 1,000 draws."""
    d, rng = d[:1000], np.random.default_rng(4)
    n = d.shape[-1]
    again = d[:, rng.integers(n, size=(399, n))]
    mean, error = d.mean(-1), d.std(-1, ddof=1) / np.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (again.mean(-1) - mean[:, None]) / (again.std(-1, ddof=1) / np.sqrt(n))
    low, high = np.quantile(np.nan_to_num(t, posinf=1e9, neginf=-1e9), [0.025, 0.975], axis=-1)
    return mean - high * error, mean - low * error


def covered(bounds: Bounds, truth: float) -> float:
    low, high = bounds
    return float(((low <= truth + 1e-12) & (high >= truth - 1e-12)).mean())


@pytest.mark.parametrize(("draws", "sizes"), DRAWS)
@pytest.mark.parametrize("row", ROWS)
def test_the_interval_holds_from_eight_pairs_on(row: str, draws: int, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(list(ROWS).index(row))
    arm, reference = ROWS[row](rng, 1, 2_000_000)
    whole = (arm - reference)[0]
    mean, half = float(whole.mean()), len(whole) // 2
    pseudomedian = float(np.median((whole[:half] + whole[half:]) / 2))
    cut = int(tails.TRIM * len(whole))
    trimmed = float(np.sort(whole)[cut:-cut].mean())
    for n in sizes:
        arm, reference = ROWS[row](rng, draws, n)
        d = arm - reference
        new = covered(rank(d), pseudomedian)
        others = {
            "mean, t": (mean_t, mean),
            "mean, bootstrap-t": (bootstrap_t, mean),
            "trimmed mean, t": (yuen, trimmed),
        }
        old = ", ".join(f"{name} {covered(of(d), truth):.1%}" for name, (of, truth) in others.items())
        print(f"{row}, n {n}: signed ranks {new:.1%}; {old}")
        if n >= tails.LEAST:
            assert new >= 0.93 - (0 if draws >= 20_000 else 2.5 * np.sqrt(0.93 * 0.07 / draws))


WORSE: dict[str, Draw] = {
    "late 1/6 +0.15 in the arm, truth +0.025": planted(1 / 6, 0.15),
    "late 3/32 +0.08 in the arm, truth +0.0125": planted(3 / 32, 0.08, shift=0.005),
    "Gaussian, truth +0.010": planted(0, 0, shift=0.01),
    "late 1/6 +0.15, both arms, truth +0.010": planted(1 / 6, 0.15, both=True, shift=0.01),
}


def late_share(values: Any) -> Any:
    return (values - np.median(values, axis=-1, keepdims=True) > 0.05).mean(axis=-1)


@pytest.mark.parametrize(("draws", "sizes"), DRAWS)
@pytest.mark.parametrize("row", WORSE)
@pytest.mark.parametrize("margin", [0.01])
def test_an_arm_that_is_worse_is_seldom_called_no_worse(
    row: str, margin: float, draws: int, sizes: tuple[int, ...]
) -> None:
    rng = np.random.default_rng([1, list(WORSE).index(row)])
    for n in (*sizes, 27, 40) if draws >= 20_000 else (*sizes, 27):
        arm, reference = WORSE[row](rng, draws, n)
        d = arm - reference
        cost = tails.late_cost("bpb", late_share(arm), n, late_share(reference), n)
        _, p = tails.no_worse(d, margin, tail=True, cost=cost)
        back = tails.late_cost("bpb", late_share(reference), n, late_share(arm), n)
        equal = tails.locate(d, margin, tail=True, cost=np.maximum(cost, back)).within < 0.05
        old = contrasts.under(contrasts.paired(d), margin) < 0.05
        print(f"{row}, n {n}: no worse {(p < 0.05).mean():.1%} (t alone {old.mean():.1%}), equal {equal.mean():.1%}")
        assert max((p < 0.05).mean(), equal.mean()) <= 0.06 + (0 if draws >= 20_000 else 0.02)


def test_signed_ranks_are_wilcoxons_and_their_interval_inverts_the_test() -> None:
    rng = np.random.default_rng(3)
    for n in (5, 8, 13):
        d = rng.normal(0.4, 1, n)
        e = ranks.signed_rank(d)
        assert float(e.p) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, rel=1e-9)
        means = sorted((x + y) / 2 for x, y in itertools.combinations_with_replacement(d, 2))
        assert float(e.effect) == pytest.approx(np.median(means))
    e = ranks.signed_rank(d)
    slack = 1e-9
    for inside, outside in ((e.low + slack, e.low - slack), (e.high - slack, e.high + slack)):
        assert stats.wilcoxon(d - float(inside), method="exact").pvalue > 0.05
        assert stats.wilcoxon(d - float(outside), method="exact").pvalue <= 0.05
    same = ranks.rank_tests(np.zeros(8), 0.01)
    assert (float(same.p), float(same.beyond)) == (1, 1)
    assert float(same.within) == pytest.approx(2**-8)


def test_the_share_of_late_runs_has_newcombes_interval() -> None:
    # Newcombe 1998, table II, method 10: 56/70 - 48/80 is 0.0524 to 0.3339.
    assert float(tails.share_bound(56 / 70, 70, 48 / 80, 80)) == pytest.approx(0.3339, abs=5e-5)
    assert -float(tails.share_bound(48 / 80, 80, 56 / 70, 70)) == pytest.approx(0.0524, abs=5e-5)
    assert tails.pairs_without_late_runs("bpb", 0.01) == 27
    assert tails.pairs_without_late_runs("n_eff_frac", 0.05) == 2


def test_power_answers_the_question_asked() -> None:
    rng = np.random.default_rng(6)
    for sd, match, no_worse in ((0.013, 16, 12), (0.020, 36, 27), (0.033, 95, 69)):
        assert power.seeds_to_show(0.01 / sd) == match
        assert power.seeds_to_show(0.01 / sd, one_sided=True) == no_worse
        d = rng.normal(0, sd, (4000, match))
        shown = (contrasts.within(contrasts.paired(d), 0.01) < 0.05).mean()
        assert shown == pytest.approx(0.8, abs=0.03)
    assert power.seeds_to_find(1.0) == 10
    assert power.seeds_to_show(0.001) is None


def test_outlying_runs_are_those_far_behind_their_arms_median() -> None:
    values = {1: 2.0, 2: 2.01, 3: 1.9, 4: 2.08}
    assert tails.outlying("bpb", values) == [4]
    assert tails.outlying("n_eff_frac", values) == []
    beside = tails.beside("bpb", {1: 0.0, 2: 0.01, 3: -0.01, 4: 0.08}, [("arm", 4)])
    assert (beside["mean"], beside["median"]) == (pytest.approx(0.02), pytest.approx(0.005))
    assert beside["without_outlying"]["effect"] == pytest.approx(0.0)
    assert beside["without_outlying"]["n"] == 3
