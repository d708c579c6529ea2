from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console

from ablate.balance.prune import (
    control_leaves,
    leaf_usage,
    living_leaves,
    prune,
    prune_report,
    report_table,
    threshold_share,
    units_left,
)
from ablate.config import ConfigError, Trial, parse
from ablate.model.ragged import RaggedFeedForward, keep
from ablate.model.transformer import Transformer
from ablate.model.tree import TreeFeedForward, tree_spec
from ablate.training.checkpoint import load_model, save_model

VOCAB = 40


def trial(**tree: Any) -> Trial:
    model = {"d_model": 16, "blocks": 2, "heads": 2, "context": 32}
    return parse(Trial, {"model": model, "tree": {"trees": 2, "depth": 5, "leaf_width": 2} | tree})


def imbalanced(**tree: Any) -> Transformer:
    """A model some of whose leaves no token reaches: every root sends nearly all to one side."""
    model = Transformer(trial(**tree), VOCAB).eval()
    for layer in model.trees():
        with torch.no_grad():
            assert layer.b is not None
            layer.b[:, 0] += 2
            if layer.router_b is not None:
                layer.router_b[:, 0] += 2
    return model


def batches() -> list[torch.Tensor]:
    return list(torch.randint(0, VOCAB, (3, 16, 32), generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def loss(model: Transformer) -> float:
    logits = torch.cat([model(ids)[:, :-1].reshape(-1, VOCAB) for ids in batches()])
    return float(F.cross_entropy(logits, torch.cat([ids[:, 1:].reshape(-1) for ids in batches()])))


def test_thresholds_as_typed() -> None:
    assert threshold_share("0", 64) == 0
    assert threshold_share("0.01/L", 64) == 0.01 / 64
    assert threshold_share(" 1e-3 ", 64) == 1e-3
    for text in ("1", "-0.1", "x", "0.1/K", "", "1e-3e", "nan"):
        with pytest.raises(ConfigError, match="threshold is"):
            threshold_share(text, 64)


def test_living_leaves_by_hand() -> None:
    counts = np.array([[0, 10, 3, 2, 40, 45, 0, 0]])  # 15 and 85 of 100
    assert living_leaves(counts, 0.0).tolist() == [[False, True, True, True, True, True, False, False]]
    assert living_leaves(counts, 0.05).tolist() == [[False, True, False, False, True, True, False, False]]
    # 3 and 2 are each under 4 per cent but together over it: the fuller one stays.
    assert living_leaves(counts, 0.04).tolist() == [[False, True, True, False, True, True, False, False]]
    assert living_leaves(counts, 0.15).tolist() == [[False, False, False, False, True, True, False, False]]
    assert living_leaves(np.array([[1, 1, 1, 1]]), 0.5).tolist() == [[True, False, False, False]]
    with pytest.raises(ValueError, match="no token"):
        living_leaves(np.zeros((1, 4), dtype=np.int64), 0.0)


@given(
    hnp.arrays(np.int64, (3, 2, 8), elements=st.integers(0, 50)).filter(lambda c: c.sum(-1).all()),
    st.floats(0, 0.9),
)
def test_living_leaves_keep_an_end_for_every_path(counts: np.ndarray, share: float) -> None:
    living = living_leaves(counts, share)
    total = counts.sum(-1, keepdims=True)
    assert living.any(-1).all()
    assert (counts[living] > 0).all()
    assert living[counts > share * total].all()
    assert (living == living_leaves(counts * living, 0.0)).all()


@pytest.mark.parametrize("node_output", [True, False])
def test_units_left_are_those_a_ragged_layer_has(node_output: bool) -> None:
    layer = TreeFeedForward(4, trees=3, depth=4, leaf_width=3, node_output=node_output)
    rng = np.random.default_rng(0)
    for _ in range(10):
        living = rng.random((3, 16)) < rng.random()
        living[:, 5] = True
        assert units_left(living, layer.spec).sum() == keep(layer, living).total_units


@pytest.mark.parametrize("node_output", [True, False])
def test_controls_remove_as_many_units_in_ascending_order(node_output: bool) -> None:
    spec = tree_spec(trial(node_output=node_output, depth=6).tree)
    rng = np.random.default_rng(1)
    used = living_leaves(rng.multinomial(500, rng.dirichlet(np.full(64, 0.2), 2)), 0.0)
    wanted, order = units_left(used, spec), rng.random((2, 64))
    living = control_leaves(order, wanted, spec)
    left = units_left(living, spec)
    assert (left >= wanted).all()
    assert (left - wanted <= spec.leaf_width).all()
    for tree in range(2):
        first_gone = order[tree][~living[tree]]
        # A prefix of the order, but for the last few that did not fit any more.
        assert (np.sort(order[tree])[: len(first_gone) - 3] == np.sort(first_gone)[:-3]).all()
    assert control_leaves(order, np.zeros(2, dtype=np.int64), spec).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings",
    [{}, {"node_output": False}, {"placement": "sum"}, {"router": "frozen"}, {"routing": "centred"}],
    ids=str,
)
def test_pruning_what_nobody_uses_changes_no_bit(settings: dict[str, Any]) -> None:
    model = imbalanced(**settings)
    before = loss(model)
    pruned, report = prune_report(model, batches(), loss, 0.0)
    assert report.identical
    assert report.largest_change == 0
    assert report.bpb_before == report.bpb_after == pytest.approx(before, abs=1e-5)
    assert report.units_after < report.units_before
    assert report.bytes_after < report.bytes_before
    assert report.leaves_after == (leaf_usage(model, batches()) > 0).sum()
    assert sum(after for _, after in report.layer_units) == report.units_after
    assert len(pruned.trees()) == 0
    assert len(model.trees()) == 2
    assert abs(report.controls["random"].units - report.units_after) <= 3 * 2 * 2
    assert all(b != before for c in report.controls.values() for b in c.bpb)
    console = Console(file=io.StringIO(), width=100)
    console.print(report_table(report))
    assert "the same bit for bit" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_threshold_removes_more_and_says_what_changed() -> None:
    model = imbalanced()
    exact = prune_report(model, batches(), loss, 0.0)[1]
    rough = prune_report(model, batches(), loss, 0.05)[1]
    assert rough.units_after < exact.units_after
    assert not rough.identical
    assert rough.largest_change > 0
    assert rough.always_taken > 0


def test_a_pruned_checkpoint_loads_like_any_other(tmp_path: Any) -> None:
    model = imbalanced(router="frozen")
    pruned = prune(model, living_leaves(leaf_usage(model, batches()), 0.0))
    save_model(tmp_path / "full.pt", model, trial(router="frozen"), "hash")
    save_model(tmp_path / "pruned.pt", pruned, trial(router="frozen"), "hash")
    assert (tmp_path / "pruned.pt").stat().st_size < (tmp_path / "full.pt").stat().st_size
    loaded, _, _ = load_model(tmp_path / "pruned.pt")
    assert any(isinstance(m, RaggedFeedForward) for m in loaded.modules())
    with torch.no_grad():
        for ids in batches():
            assert torch.equal(loaded(ids), pruned(ids))
            torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="pruned before"):
        prune_report(loaded, batches(), loss, 0.0)
