"""Each test of two arms against SciPy, statsmodels, figures from R, or brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]
from statsmodels.stats.weightstats import ttost_paired  # type: ignore[import-untyped]

from ablate.analysis import contrasts
from ablate.analysis.contrasts import Claim

RNG = np.random.default_rng(5)
A, B = RNG.normal(2.0, 0.02, 8), RNG.normal(2.01, 0.03, 8)


def test_paired_matches_scipy_and_its_interval() -> None:
    e = contrasts.paired(A - B)
    theirs = stats.ttest_rel(A, B)
    interval = theirs.confidence_interval(0.95)
    assert e.p == pytest.approx(theirs.pvalue, rel=1e-12)
    assert [e.low, e.high] == pytest.approx([interval.low, interval.high], rel=1e-12)


def test_paired_on_students_sleep_data_gives_r_s_figures() -> None:
    # R: t.test(extra ~ group, data = sleep, paired = TRUE): t = -4.0621, df = 9, p-value = 0.002833,
    # 95 percent confidence interval -2.4598858 -0.7001142, mean difference -1.58.
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    e = contrasts.paired(first - second)
    assert float(e.p) == pytest.approx(0.002833, abs=5e-7)
    assert [float(e.low), float(e.high)] == pytest.approx([-2.4598858, -0.7001142], abs=5e-8)
    # R: t.test(extra ~ group, data = sleep): Welch, df = 17.776, p-value = 0.07939, interval -3.3654832 0.2054832.
    w = contrasts.welch(first, second)
    assert float(w.df) == pytest.approx(17.776, abs=5e-4)
    assert float(w.p) == pytest.approx(0.07939, abs=5e-6)
    assert [float(w.low), float(w.high)] == pytest.approx([-3.3654832, 0.2054832], abs=5e-8)


def test_welch_matches_scipy_for_unequal_sizes() -> None:
    e = contrasts.welch(A, B[:5])
    theirs = stats.ttest_ind(A, B[:5], equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert [e.p, e.df, e.low, e.high] == pytest.approx(
        [theirs.pvalue, theirs.df, interval.low, interval.high], rel=1e-12
    )


def test_ratio_is_fiellers_and_bounded_only_where_the_denominator_is() -> None:
    rng = np.random.default_rng(3)
    b = 1.0 + 0.1 * rng.normal(size=6)
    a = 0.4 * b + 0.05 * rng.normal(size=6)
    value, bounds = contrasts.ratio(a, b)
    assert value == pytest.approx(a.mean() / b.mean())
    assert bounds is not None
    # At both ends mean(a - q b) is just at the edge of its t interval.
    for q in bounds:
        assert stats.ttest_1samp(a - q * b, 0).pvalue == pytest.approx(0.05)
    assert bounds[0] < value < bounds[1]
    assert contrasts.ratio(a, b - b.mean())[1] is None


def test_a_ratio_s_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(2000):
        shared = rng.normal(size=5)
        b = 1.0 + 0.2 * shared
        low, high = contrasts.ratio(0.3 + 0.1 * shared + 0.1 * rng.normal(size=5), b)[1] or (-np.inf, np.inf)
        hits += low <= 0.3 <= high
    assert hits / 2000 == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 2000))


@pytest.mark.parametrize("margin", [0.005, 0.02, 0.1])
def test_tost_matches_statsmodels(margin: float) -> None:
    assert contrasts.within(contrasts.paired(A - B), margin) == pytest.approx(
        ttost_paired(A, B, -margin, margin)[0], rel=1e-10
    )


def test_beyond_is_twice_the_one_sided_t_test_against_the_nearer_margin() -> None:
    d = np.array([0.05, 0.06, 0.055, 0.07])
    one_sided = stats.ttest_1samp(d, 0.01, alternative="greater").pvalue
    assert contrasts.beyond(contrasts.paired(d), 0.01) == pytest.approx(2 * one_sided, rel=1e-12)
    assert contrasts.beyond(contrasts.paired(-d), 0.01) == pytest.approx(2 * one_sided, rel=1e-12)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_sign_flip_matches_brute_force_and_its_floor(n: int) -> None:
    d = RNG.normal(0.3, 1, n)
    sums = [abs(np.dot(signs, d)) for signs in itertools.product([1, -1], repeat=n)]
    expected = np.mean([s >= abs(d.sum()) - 1e-12 for s in sums])
    assert contrasts.sign_flip(d, RNG) == pytest.approx(expected)
    assert contrasts.sign_flip(np.ones(n), RNG) == pytest.approx(2.0 ** (1 - n))


def test_sampled_sign_flip_agrees_with_scipys_permutation_test() -> None:
    d = RNG.normal(0.25, 1, 20)
    theirs = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=20000, rng=np.random.default_rng(1)
    )
    ours = contrasts.sign_flip(d, np.random.default_rng(2))
    # Both are Monte Carlo: four standard errors of the smaller sample.
    assert float(ours) == pytest.approx(
        theirs.pvalue, abs=float(4 * np.sqrt(theirs.pvalue * (1 - theirs.pvalue) / 20000))
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_matches_statsmodels(p: list[float]) -> None:
    assert contrasts.holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_benjamini_hochberg_matches_scipy(p: list[float]) -> None:
    assert contrasts.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p), abs=1e-12)


def test_adjustments_work_along_the_last_axis() -> None:
    p = RNG.random((4, 3, 6))
    for adjust in (contrasts.holm, contrasts.benjamini_hochberg):
        assert adjust(p)[2, 1] == pytest.approx(adjust(p[2, 1]))


def test_identical_differences_have_no_spread_and_no_false_doubt() -> None:
    same = contrasts.paired(np.zeros(3))
    assert [float(same.p), float(contrasts.within(same, 0.01))] == [1, 0]
    shifted = contrasts.paired(np.array([2.1, 2.2, 2.3]) - np.array([2.0, 2.1, 2.2]))  # 0.1 but for rounding
    p = [shifted.p, contrasts.within(shifted, 0.01), contrasts.beyond(shifted, 0.01)]
    assert [float(x) for x in p] == [0, 1, 0]


def verdict(differences: list[float], claim: Claim, margin: float = 0.01) -> str:
    e = contrasts.paired(np.array([differences]))
    judged = contrasts.judge(contrasts.t_tests(e, np.array([margin])), [claim], "holm")
    below = " below margin" if judged.below_margin[0] else ""
    return ("supported" if judged.supported[0] else "refuted" if judged.refuted[0] else "inconclusive") + below


TINY = [0.0031, 0.0029, 0.0030, 0.0032]
LARGE = [-0.051, -0.049, -0.052, -0.050]
NOISE = [0.05, -0.06, 0.02, -0.01]


@pytest.mark.parametrize(
    ("differences", "claim", "expected"),
    [
        (LARGE, "lower", "supported"),
        (LARGE, "differs", "supported"),
        (LARGE, "matches", "refuted"),
        (LARGE, "higher", "refuted"),
        (TINY, "matches", "supported"),
        (TINY, "higher", "supported below margin"),
        (TINY, "lower", "refuted"),
        (NOISE, "lower", "inconclusive"),
        (NOISE, "matches", "inconclusive"),
        (NOISE, "differs", "inconclusive"),
    ],
)
def test_verdicts(differences: list[float], claim: Claim, expected: str) -> None:
    assert verdict(differences, claim) == expected


def test_a_family_is_harder_to_pass_than_one_test() -> None:
    alone = contrasts.t_tests(contrasts.paired(np.array([[0.03, 0.04, 0.035]])), np.array([0.01]))
    assert contrasts.judge(alone, ["differs"], "holm").supported[0]
    rows = np.vstack([[0.03, 0.04, 0.035], RNG.normal(0, 1, (9, 3))])
    many = contrasts.judge(contrasts.t_tests(contrasts.paired(rows), np.full(10, 0.01)), ["differs"] * 10, "holm")
    assert not many.supported[0]


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_seeds_are_an_error(n: int) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        contrasts.paired(np.zeros(n))
    with pytest.raises(ValueError, match="at least 2"):
        contrasts.welch(np.zeros(n), np.zeros(3))
