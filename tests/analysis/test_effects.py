"""The factor analysis against statsmodels' formulas, Pareto and power against brute force and published figures."""

import itertools

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import statsmodels.formula.api as smf  # type: ignore[import-untyped]
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.anova import AnovaRM, anova_lm  # type: ignore[import-untyped]
from statsmodels.stats.power import TTestIndPower, TTestPower  # type: ignore[import-untyped]
from statsmodels.stats.proportion import proportion_confint  # type: ignore[import-untyped]

from ablate.analysis import effects, pareto, power, rates
from ablate.config.endpoints import BPB

RNG = np.random.default_rng(11)


def grid(*levels: int, drop: int = 0) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64], NDArray[np.float64]]:
    """Codes of factors a, b, c, seeds (the last level count) and noisy outcomes, `drop` runs left out at random."""
    rows = np.array(list(itertools.product(*(range(k) for k in levels))))
    keep = np.sort(RNG.permutation(len(rows))[drop:])
    rows = rows[keep]
    codes = {name: rows[:, i] for i, name in enumerate("abc"[: len(levels) - 1])}
    y = RNG.normal(size=len(rows)) + 0.6 * rows[:, 0] * rows[:, 1] + 0.3 * rows[:, -1]
    return codes, rows[:, -1], y


@pytest.mark.parametrize(("levels", "drop"), [((2, 2, 3), 0), ((3, 2, 2, 3), 0), ((3, 2, 2, 3), 3), ((2, 3, 8), 2)])
def test_anova_is_the_type_two_hypothesis_with_an_hc3_covariance(levels: tuple[int, ...], drop: int) -> None:
    codes, seeds, y = grid(*levels, drop=drop)
    frame = pd.DataFrame({**codes, "s": seeds, "y": y})
    mains = " + ".join(f"C({f}, Sum)" for f in codes)
    model = smf.ols(f"y ~ C(s, Sum) + ({mains}) ** 2", frame).fit()
    robust, classical = model.get_robustcov_results("HC3", use_t=True), anova_lm(model, typ=2)
    x, names = model.model.exog, model.model.data.model_spec.term_name_slices
    d = effects.design(codes, seeds)
    for test in effects.anova(d, y):
        f, df, error = effects.over_runs(d, effects.fit(d, y), test.term)
        row = ":".join(f"C({f}, Sum)" for f in test.term)
        # The term's columns with every term that does not contain it taken out: what type II asks about E[y] = X beta.
        above = {row, *(n for n in names if {*row.split(":")} < {*n.split(":")})}
        others = np.hstack([x[:, s] for n, s in names.items() if n not in above])
        own = x[:, names[row]]
        theirs = robust.f_test((own - others @ np.linalg.lstsq(others, own, rcond=None)[0]).T @ x)
        assert [df, float(f), float(error)] == pytest.approx(
            [theirs.df_num, float(theirs.fvalue), theirs.df_denom], rel=1e-7
        )
        assert test.unit == ("runs" if drop else "seeds")
        square, df = classical.loc[row, ["sum_sq", "df"]]
        expected = (square - df * model.mse_resid) / (square + (len(y) - df) * model.mse_resid)
        assert float(test.omega2) == pytest.approx(expected, rel=1e-8)


def test_anova_over_seeds_is_statsmodels_repeated_measures() -> None:
    codes, seeds, y = grid(3, 2, 6)
    frame = pd.DataFrame({**codes, "s": seeds, "y": y})
    theirs = AnovaRM(frame, "y", "s", within=["a", "b"]).fit().anova_table
    for test in effects.anova(effects.design(codes, seeds), y):
        row = theirs.loc[":".join(test.term)]
        assert [test.df, float(test.f)] == pytest.approx([row["Num DF"], row["F Value"]], rel=1e-8)
        assert float(test.error_df) <= row["Den DF"] + 1e-9
    # A factor of two levels is the paired t test of its means by seed.
    means = frame.groupby(["s", "b"])["y"].mean().unstack()
    [b] = [t for t in effects.anova(effects.design(codes, seeds), y) if t.term == ("b",)]
    assert float(b.p) == pytest.approx(stats.ttest_rel(means[1], means[0]).pvalue, rel=1e-8)


def test_a_level_s_effect_in_each_seed_of_a_fraction_is_the_difference_of_its_means() -> None:
    a, b = np.array([0, 0, 1, 1] * 3), np.array([0, 1, 0, 1] * 3)
    seeds = np.repeat([0, 1, 2], 4)
    d = effects.design({"a": a, "b": b, "c": (a + b) % 2}, seeds)
    y = RNG.normal(size=12)
    found = effects.level_by_seed(d, y, "c", 1)
    c = (a + b) % 2
    by_hand = {s: y[(seeds == s) & (c == 1)].mean() - y[(seeds == s) & (c == 0)].mean() for s in range(3)}
    assert found == pytest.approx(by_hand)


def test_many_outcomes_at_once_are_each_alone() -> None:
    codes, seeds, y = grid(2, 2, 3)
    d = effects.design(codes, seeds)
    several = np.stack([y, RNG.normal(size=len(y))])
    for together, alone in zip(effects.anova(d, several), effects.anova(d, several[1]), strict=True):
        assert [together.p[1], together.omega2[1]] == pytest.approx([float(alone.p), float(alone.omega2)], rel=1e-10)


def test_what_cannot_be_estimated_is_left_out_or_refused() -> None:
    a = np.array([0, 0, 1, 1] * 3)
    b = np.array([0, 1, 0, 1] * 3)
    seeds = np.repeat([0, 1, 2], 4)
    half = effects.design({"a": a, "b": b, "c": (a + b) % 2}, seeds)  # c is aliased with a:b
    assert set(half.left_out) == {("a", "b"), ("a", "c"), ("b", "c")}
    with pytest.raises(ValueError, match="'b' cannot be separated"):
        effects.design({"a": a, "b": a}, seeds)


def test_bootstrap_of_omega_squared_resamples_whole_seeds() -> None:
    codes, seeds, y = grid(2, 2, 5)
    d = effects.design(codes, seeds)
    intervals = effects.bootstrap_omega2(d, y, np.random.default_rng(3), draws=300)
    again = effects.bootstrap_omega2(d, y, np.random.default_rng(3), draws=300)
    assert intervals.tolist() == again.tolist()
    assert (intervals[:, 0] <= intervals[:, 1]).all()
    # By hand: the same draws, each analysed from scratch.
    rng = np.random.default_rng(3)
    by_seed = y.reshape(4, 5).T
    values = []
    for drawn in rng.integers(5, size=(300, 5)):
        rows = np.concatenate([by_seed[s] for s in drawn])
        layout = effects.design({k: np.tile(v[seeds == 0], 5) for k, v in codes.items()}, np.repeat(range(5), 4))
        values.append([float(t.omega2) for t in effects.anova(layout, rows)])
    assert intervals == pytest.approx(np.nanquantile(values, [0.025, 0.975], axis=0).T, rel=1e-6)
    with pytest.raises(ValueError, match="different cells"):
        effects.bootstrap_omega2(effects.design({k: v[1:] for k, v in codes.items()}, seeds[1:]), y[1:], rng)


def test_detectable_effect_matches_statsmodels_and_the_plan() -> None:
    assert [round(power.detectable(n, paired=False), 2) for n in (3, 5, 8, 10)] == [3.07, 2.02, 1.51, 1.32]
    for n in (4, 8, 20):
        theirs = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
        assert power.detectable(n, paired=True) == pytest.approx(theirs, rel=1e-4)
        both = TTestIndPower().solve_power(nobs1=n, alpha=0.05, power=0.8)
        assert power.detectable(n, paired=False) == pytest.approx(both, rel=1e-4)


@pytest.mark.parametrize(("hit", "n"), [(0, 3), (1, 3), (5, 8), (8, 8)])
def test_wilson_matches_statsmodels(hit: int, n: int) -> None:
    low, high = power.wilson(hit, n)
    assert [float(low), float(high)] == pytest.approx(proportion_confint(hit, n, method="wilson"), abs=1e-12)


def test_brown_forsythe_is_scipys_levene_on_medians() -> None:
    groups = [RNG.normal(0, s, 8) for s in (1, 1, 4)]
    assert power.brown_forsythe(groups) == pytest.approx(stats.levene(*groups, center="median").pvalue)
    assert power.brown_forsythe([groups[0]]) is None


def test_separation_by_hand() -> None:
    values, flags = [0.1, 0.2, 0.8, 0.9], [False, False, True, True]
    assert power.separation(values, flags) == pytest.approx(0.7 / 0.05)
    assert power.separation(values, [False] * 4) == 0


def test_front_and_hypervolume_match_brute_force() -> None:
    for _ in range(40):
        m = int(RNG.integers(1, 9))
        cost, gain = RNG.integers(0, 5, m) / 4, RNG.integers(0, 5, m) / 4
        beaten = [
            any(
                cost[j] <= cost[i] and gain[j] >= gain[i] and (cost[j] < cost[i] or gain[j] > gain[i]) for j in range(m)
            )
            for i in range(m)
        ]
        assert pareto.front(cost, gain).tolist() == [not b for b in beaten]
        x, y = np.meshgrid((np.arange(80) + 0.5) / 40, (np.arange(80) + 0.5) / 40)  # cells of 1/40 over [0, 2]
        dominated = np.zeros(x.shape, dtype=bool)
        for c, g in zip(cost, gain, strict=True):
            dominated |= (x >= c) & (y <= g) & (x <= 1.5)
        assert pareto.hypervolume(cost, gain, (1.5, 0.0)) == pytest.approx(dominated.sum() / 1600, abs=1e-9)


def test_a_clear_winner_is_on_the_front_in_every_resample() -> None:
    cost = [np.array([1.0, 1.01, 0.99]), np.array([2.0, 2.02, 1.99])]
    gain = [np.array([0.9, 0.91, 0.9]), np.array([0.3, 0.31, 0.3])]
    found = pareto.over_seeds(cost, gain, (3.0, 0.0), np.random.default_rng(0))
    assert [found["probability"], found["front"]] == [[1.0, 0.0], [True, False]]
    assert found["interval"][0] <= found["hypervolume"] <= found["interval"][1]


def test_expected_best_of_n_matches_every_subset() -> None:
    values = RNG.normal(2, 0.1, 6)
    expected = [np.mean([min(s) for s in itertools.combinations(values, n)]) for n in range(1, 7)]
    assert rates.best_of(values, BPB) == pytest.approx(expected)
