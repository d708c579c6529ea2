"""The landscape of `ablate bench search` has the optimum it says, and a search on it spends what it is given."""

from __future__ import annotations

from ablate.bench.search import RULES, planted, simulate
from ablate.config import Scalar


def test_the_planted_optimum_is_zero_and_a_search_is_repeatable() -> None:
    best: dict[str, Scalar] = {
        "tree.depth": 4,
        "tree.mirror": 0.4,
        "train.lr": 0.006,
        "tree.activation": "gelu",
        "tree.init": "uniform",
    }
    assert planted(best) == 0
    assert planted({**best, "tree.depth": 7}) > 0.03
    racing = next(rule for rule in RULES if rule.race and rule.finalists)
    one, two = simulate(racing, 36, 3), simulate(racing, 36, 3)
    assert one == two
    assert one.regret >= 0
    assert 21 / racing.seeds <= one.candidates <= 21
