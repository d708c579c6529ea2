from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, optimize, special, stats

from ablate.balance import metrics

LOADS = st.integers(0, 5).flatmap(
    lambda depth: hnp.arrays(np.int64, (2, 1 << depth), elements=st.integers(0, 500)).filter(lambda c: c.sum(1).all())
)


def brute_force(c: list[int]) -> dict[str, float]:
    """Every count metric of one tree as a plain loop over the definitions."""
    n, width = sum(c), len(c)
    depth = width.bit_length() - 1
    p = [x / n for x in c]
    h = -sum(q * math.log(q) for q in p if q > 0)
    branch = []
    for d in range(depth):
        size, level = width >> d, 0.0
        for start in range(0, width, size):
            left, right = sum(c[start : start + size // 2]), sum(c[start + size // 2 : start + size])
            if left + right:
                level += (left + right) / n * abs(2 * right / (left + right) - 1)
        branch.append(level)
    return {
        "n_eff_frac": math.exp(h) / width,
        "bits_lost": 1 - h / math.log(width) if depth else 0.0,
        "dead_frac": sum(q < 0.01 / width for q in p) / width,
        "never_hit": sum(x == 0 for x in c) / width,
        "max_vio": max(p) * width - 1,
        "min_vio": 1 - min(p) * width,
        "cv2": (sum((x - n / width) ** 2 for x in c) / width) / (n / width) ** 2,
        "gini": sum(abs(a - b) for a in p for b in p) / (2 * width),
        "branch_imbalance": sum(branch) / depth if depth else 0.0,
    }


def test_hand_computed_case() -> None:
    c = np.array([1, 3, 0, 4])  # root 4 | 4, left node 1 | 3, right node 0 | 4
    assert [level.tolist() for level in metrics.node_counts(c)] == [[8], [4, 4], [1, 3, 0, 4]]
    h = -(1 / 8 * math.log(1 / 8) + 3 / 8 * math.log(3 / 8) + 1 / 2 * math.log(1 / 2))
    assert metrics.entropy_nats(c) == pytest.approx(h)
    assert metrics.entropy_nats(c, corrected=True) == pytest.approx(h + (3 - 1) / 16)
    assert metrics.n_eff_frac(c) == pytest.approx(math.exp(h) / 4)
    quarter = 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3)
    assert metrics.bits_lost_by_level(c) == pytest.approx([0.0, (1 - 0.5 * quarter) / 2])
    assert metrics.branch_imbalance(c) == pytest.approx([0.0, 0.5 * 0.5 + 0.5 * 1.0])
    assert metrics.max_vio(c) == pytest.approx(1.0)
    assert metrics.min_vio(c) == pytest.approx(1.0)
    assert metrics.cv2(c) == pytest.approx(4 * (1 + 9 + 16) / 64 - 1)
    assert metrics.cv2_floor(c) == pytest.approx(3 / 8)
    assert metrics.gini(c) == pytest.approx((-3 * 0 - 1 * 1 + 1 * 3 + 3 * 4) / 8 / 4)
    assert metrics.never_hit(c) == metrics.dead_frac(c) == 0.25


@given(LOADS)
def test_every_metric_equals_a_loop_over_its_definition(counts: np.ndarray) -> None:
    for tree, c in enumerate(counts):
        expected = brute_force(c.tolist())
        got = {name: metrics.__dict__[name](counts)[tree] for name in expected if name != "branch_imbalance"}
        got["branch_imbalance"] = metrics.summary(counts[None, tree : tree + 1])["branch_imbalance"]
        assert got == pytest.approx(expected, abs=1e-12)
        assert metrics.entropy_nats(c) == pytest.approx(stats.entropy(c), abs=1e-12)


@given(LOADS)
def test_lost_entropy_by_level_sums_to_the_total(counts: np.ndarray) -> None:
    levels = metrics.bits_lost_by_level(counts)
    assert levels.shape == (2, int(math.log2(counts.shape[1])))
    assert np.all(levels > -1e-12)
    np.testing.assert_allclose(levels.sum(-1), metrics.bits_lost(counts), atol=1e-9)


@pytest.mark.parametrize("depth", [0, 1, 6, 12])
def test_uniform_and_one_hot_loads(depth: int) -> None:
    width = 1 << depth
    uniform, hot = np.full(width, 1000), np.eye(width, dtype=np.int64)[width // 2] * 1000
    assert metrics.n_eff_frac(uniform) == pytest.approx(1)
    assert metrics.n_eff_frac(hot) == pytest.approx(1 / width)
    for metric in (metrics.bits_lost, metrics.gini, metrics.max_vio, metrics.min_vio, metrics.cv2, metrics.dead_frac):
        assert metric(uniform) == pytest.approx(0, abs=1e-12)
    assert metrics.bits_lost(hot) == (1 if depth else 0)
    assert metrics.gini(hot) == pytest.approx(1 - 1 / width)
    assert metrics.max_vio(hot) == pytest.approx(width - 1)
    assert metrics.never_hit(hot) == pytest.approx(1 - 1 / width)
    assert metrics.branch_imbalance(hot) == pytest.approx([1.0] * depth)
    assert metrics.branch_imbalance(uniform) == pytest.approx([0.0] * depth)


def test_dirichlet_loads_give_the_calibrated_values() -> None:
    # E[H] of a symmetric Dirichlet is ψ(Lα + 1) - ψ(α + 1); α is set so that N_eff/L = exp(E[H])/L is 0.80.
    target = math.log(0.8 * 128)
    alpha = optimize.brentq(lambda a: special.digamma(128 * a + 1) - special.digamma(a + 1) - target, 0.1, 100)
    counts = np.random.default_rng(0).dirichlet(np.full(128, alpha), size=4000) * 10**9
    assert metrics.n_eff_frac(counts).mean() == pytest.approx(0.80, abs=0.002)
    assert metrics.gini(counts).mean() == pytest.approx(0.37, abs=0.005)
    # Exact: shares are gammas over their independent sum, so E[max p] = E[max of L gammas] / (L α); it is 2.75.
    largest = integrate.quad(lambda g: 1 - stats.gamma.cdf(g, alpha) ** 128, 0, 60)[0]
    assert metrics.max_vio(counts).mean() == pytest.approx(largest / alpha - 1, abs=0.05)
    assert largest / alpha - 1 == pytest.approx(2.8, abs=0.06)


def test_sampling_floors_of_a_uniform_router() -> None:
    counts = np.random.default_rng(1).multinomial(64 * 128, np.full(128, 1 / 128), size=2000)
    assert metrics.cv2(counts).mean() == pytest.approx(metrics.cv2_floor(counts).mean(), rel=0.02)
    plug_in, corrected = metrics.n_eff_frac(counts), metrics.n_eff_frac(counts, corrected=True)
    assert plug_in.mean() == pytest.approx(math.exp(-127 / (2 * 64 * 128)), abs=1e-4)
    # Corrected values are cut at 1, so the mean stays a little under it.
    assert 1 - corrected.mean() < 0.1 * (1 - plug_in.mean())
    max_vio = metrics.max_vio(np.random.default_rng(2).multinomial(128_000, np.full(128, 1 / 128), size=500))
    assert max_vio.mean() == pytest.approx(0.084, abs=0.01)


def test_leading_axes_are_kept() -> None:
    counts = np.random.default_rng(0).integers(0, 50, (3, 2, 5, 16))
    assert metrics.n_eff_frac(counts).shape == (3, 2, 5)
    assert metrics.bits_lost_by_level(counts).shape == (3, 2, 5, 4)
    assert metrics.branch_imbalance(counts)[1, 1, 3] == pytest.approx(metrics.branch_imbalance(counts[1, 1, 3]))


def test_a_tree_without_tokens_has_no_balance() -> None:
    counts = np.array([[0, 0], [1, 1]])
    for metric in (metrics.n_eff_frac, metrics.bits_lost, metrics.dead_frac, metrics.never_hit, metrics.gini):
        assert np.isnan(metric(counts)).tolist() == [True, False]


def test_counts_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="6 leaves"):
        metrics.node_counts(np.ones(6, dtype=np.int64))


def test_flips_and_saturation() -> None:
    a = np.array([[0, 0, 1, 1], [2, 2, 2, 2]])
    b = np.array([[0, 1, 1, 1], [2, 2, 2, 2]])
    assert metrics.flip_rate(a, b).tolist() == [0.25, 0.0]
    kappa = metrics.saturation(a, b, 4)
    chance = 0.5 * 0.25 + 0.5 * 0.75
    assert kappa[0] == pytest.approx((0.75 - chance) / (1 - chance))
    # A collapsed tree keeps every leaf and yet agrees only by chance.
    assert np.isnan(kappa[1])


def test_saturation_is_zero_for_independent_routes() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.choice(8, (2, 200_000), p=rng.dirichlet(np.full(8, 0.5)))
    assert metrics.flip_rate(a, b) < 0.9
    assert metrics.saturation(a, b, 8) == pytest.approx(0, abs=0.01)
    assert metrics.saturation(a, a, 8) == 1


def test_informativeness_of_known_routes() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1000, 1016, 50_000)
    leaves = np.stack([tokens % 4, rng.integers(0, 4, tokens.size), np.zeros_like(tokens)])
    got = metrics.informativeness(leaves, tokens, np.random.default_rng(1))
    assert got.observed[0] == pytest.approx(1)
    assert got.observed[1] == pytest.approx(got.shuffled[1], abs=1e-3)
    assert got.observed[2] == got.shuffled[2] == 0
    # Independent: mutual information from scipy's contingency table entropies.
    joint = np.unique(leaves[1] * 10_000 + tokens, return_counts=True)[1]
    entropies = [stats.entropy(np.unique(v, return_counts=True)[1]) for v in (leaves[1], tokens)]
    assert got.observed[1] == pytest.approx((sum(entropies) - stats.entropy(joint)) / entropies[0])


def test_deaths_tell_birth_transient_and_pruning_apart() -> None:
    # Columns: always alive, born dead and revived, transient, pruned, never alive, pruned after a revival.
    alive = np.array(
        [
            [1, 0, 1, 1, 0, 1, 1, 1],
            [1, 0, 0, 1, 0, 0, 1, 1],
            [1, 1, 1, 0, 0, 1, 1, 1],
            [1, 1, 1, 0, 0, 0, 1, 1],
        ]
    )
    events = metrics.deaths(alive * 1000)
    assert events.pruned.tolist() == [False, False, False, True, False, True, False, False]
    assert events.never_alive.tolist() == [False, False, False, False, True, False, False, False]
    assert events.first_death.tolist() == [-1, -1, 1, 2, -1, 1, -1, -1]
    assert events.dead_since.tolist() == [-1, -1, -1, 2, 0, 3, -1, -1]
    assert events.deaths.tolist() == [0, 0, 1, 1, 0, 2, 0, 0]
    assert events.revivals.tolist() == [0, 1, 1, 0, 0, 1, 0, 0]
    shares = {name: float(v) for name, v in events.shares().items()}
    assert shares == {"born_dead": 2 / 8, "pruned": 2 / 8, "transient": 1 / 8, "never_alive": 1 / 8, "revivals": 3 / 8}


@given(hnp.arrays(np.int64, (4, 2, 8), elements=st.sampled_from([0, 1, 1000])))
def test_death_events_add_up(counts: np.ndarray) -> None:
    counts[..., 0] = 1000
    events = metrics.deaths(counts)
    born, end = events.alive_at_start.astype(int), events.alive_at_end.astype(int)
    assert (born - events.deaths + events.revivals == end).all()
    assert (events.pruned <= events.died).all()
    assert ((events.first_death > 0) == (events.deaths > 0)).all()
    assert ((events.dead_since >= 0) == ~events.alive_at_end).all()


def test_deaths_of_a_single_evaluation() -> None:
    events = metrics.deaths(np.array([[1000, 0]]))
    assert events.first_death.tolist() == [-1, -1]
    assert events.dead_since.tolist() == [-1, 0]
    assert not events.pruned.any()


def test_gradient_skew_compares_means_and_needs_thirty_a_side() -> None:
    # Twice the gradient per token to the right, nine times the traffic to the left.
    skew = metrics.gradient_skew([200.0, 200.0, 0.0], [100, 29, 100], [900.0, 900.0, 0.0], [900, 900, 900])
    assert skew[0] == pytest.approx(1 / 3)
    assert np.isnan(skew[1:]).all()


def test_collapse_is_a_layers_mean_over_trees() -> None:
    lost = np.array([[[0.9, 0.2], [0.1, 0.1]], [[0.4, 0.5], [0.1, 0.1]]])
    assert metrics.collapse(lost).tolist() == [True, False]


def test_ceiling_of_splittable_and_unsplittable_data() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(3.0, 1.0, (20_000, 31))
    assert metrics.n_eff_frac(metrics.leaf_counts((z[:, 0] > 0).astype(int), 32)) < 0.1
    assert metrics.ceiling(z) > 0.99
    # A token that makes up a quarter of the text gets the same response everywhere: it stays on one leaf.
    z[rng.random(len(z)) < 0.25] = z[0]
    best = math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75 / 31)) / 32
    assert 0.5 < metrics.ceiling(z) <= best + 0.01
    assert metrics.ceiling(np.ones((100, 7))) == pytest.approx(1 / 8)
    assert metrics.ceiling(np.ones((100, 0))) == 1


def test_ceiling_is_measured_on_the_half_it_did_not_see() -> None:
    z = np.random.default_rng(0).normal(size=(2000, 1))
    z[1000:] += 10
    assert metrics.ceiling(z) == pytest.approx(0.5)


def test_summary_names_mean_worst_and_layers() -> None:
    counts = np.array([[[100, 100], [200, 0]], [[150, 50], [100, 100]]])
    got = metrics.summary(counts)
    assert got["never_hit"] == pytest.approx(1 / 8)
    assert got["never_hit_worst"] == got["dead_frac_worst"] == 0.5
    assert got["layer0/never_hit"] == 0.25
    assert got["n_eff_frac_worst"] == 0.5
    assert got["layer1/branch_imbalance"] == pytest.approx(0.25)
    assert got["max_vio_worst"] == 1
    assert got["collapse"] == 0  # layer 0 loses (0 + 1) / 2 = 0.5, not above it
    assert got["n_eff_resolved"] == 1
    assert got["dead_resolved"] == 0
    assert all(math.isfinite(v) for v in got.values())
    assert metrics.summary(counts * 10)["dead_resolved"] == 1


def test_summary_of_trees_without_nodes() -> None:
    got = metrics.summary(np.full((2, 3, 1), 1000))
    assert got["n_eff_frac"] == 1
    assert got["bits_lost"] == got["branch_imbalance"] == got["dead_frac"] == got["collapse"] == 0
