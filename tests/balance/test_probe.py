from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from ablate.balance import metrics
from ablate.balance.probe import Probe, UsageCounter, look, tree_ceilings
from ablate.balance.usage import TREES_SCHEMA, UsageParts, counts_from, nodes_from
from ablate.config import Trial, parse
from ablate.model.transformer import Transformer

VOCAB = 50


def model(**tree: Any) -> Transformer:
    settings = {
        "model": {"d_model": 16, "blocks": 2, "heads": 2, "context": 16},
        "tree": {"trees": 2, "depth": 3, "leaf_width": 1} | tree,
        "train": {"backend": "reference"},
    }
    return Transformer(parse(Trial, settings), VOCAB)


def batches(seed: int = 0, count: int = 2) -> list[torch.Tensor]:
    ids = torch.randint(0, VOCAB, (count * 32, 16), generator=torch.Generator().manual_seed(seed))
    return list(torch.split(ids, 32))


def evaluate(probe: Probe, net: Transformer) -> None:
    with probe.held_out(), torch.no_grad():
        for ids in batches():
            net.eval()(ids)
            probe.watch(ids)


def test_counter_streams_what_numpy_counts() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 8, (n, 3)) for n in (5, 0, 100)]
    counter = UsageCounter(2, 3, 8)
    for part in parts:
        counter.add(1, torch.from_numpy(part).int())
    got = counter.take()
    np.testing.assert_array_equal(got[1], metrics.leaf_counts(np.concatenate(parts).T, 8))
    assert got[0].sum() == counter.take().sum() == 0


def test_looking_gives_output_gradients_and_leaves_parameters_alone() -> None:
    net, ids = model(), batches()[0]
    seen = look(net.train(), net.trees(), ids)
    assert net.training
    assert all(p.grad is None for p in net.parameters())

    # Independent: add a zero to the second layer's output and ask for its gradient.
    tree = net.trees()[1]
    shift = torch.zeros(32, 15, 16, requires_grad=True)
    handle = tree.register_forward_hook(lambda _module, _args, y: y + shift)
    logits = net.eval()(ids[:, :-1])
    handle.remove()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1)), shift)
    torch.testing.assert_close(seen[1].gy, expected.view(-1, 16))
    assert tree.last_leaves is not None
    torch.testing.assert_close(seen[1].leaves, tree.last_leaves)


def test_counts_are_those_of_the_forward_passes_that_were_watched() -> None:
    net, probe = model(), Probe()
    probe.attach(net)
    evaluate(probe, net)
    expected = np.zeros((2, 2, 8), dtype=np.int64)
    with torch.no_grad():
        for ids in batches():
            net(ids)
            for i, tree in enumerate(net.trees()):
                assert tree.last_leaves is not None
                expected[i] += metrics.leaf_counts(tree.last_leaves.T.numpy(), 8)
    np.testing.assert_array_equal(probe.counts(), expected)
    np.testing.assert_array_equal(counts_from(probe.rows(0)), expected[None])
    summary = probe.summary()
    assert metrics.summary(expected).items() <= summary.items()
    assert "flip_rate" not in summary
    assert all(np.isfinite(v) for v in summary.values())


def test_training_counts_fill_their_own_window_and_start_anew() -> None:
    net, probe = model(), Probe()
    probe.attach(net)
    evaluate(probe, net)
    assert probe.rows(0)["window"].unique().to_list() == ["held_out"]
    for ids in batches(seed=1):
        net.train()(ids)
        probe.watch_training()
    evaluate(probe, net)
    frame = probe.rows(5)
    assert counts_from(frame, "train").sum() == 2 * 2 * 2 * 32 * 16
    assert frame.filter(window="train")["skew"].null_count() == len(frame.filter(window="train"))
    evaluate(probe, net)
    assert "train" not in probe.rows(10)["window"]


def test_flips_follow_the_weights() -> None:
    net, probe = model(), Probe()
    probe.attach(net)
    evaluate(probe, net)
    evaluate(probe, net)
    assert probe.summary()["flip_rate"] == 0
    with torch.no_grad():
        tree = net.trees()[1]
        assert tree.b is not None
        tree.w_in.neg_()
        tree.b.neg_()
    evaluate(probe, net)
    summary = probe.summary()
    assert summary["layer0/flip_rate"] == 0
    assert summary["layer1/flip_rate"] == summary["flip_rate_worst"] == 1


def test_skew_and_offset_reach_the_usage_table() -> None:
    net, probe = model(), Probe()
    probe.attach(net)
    evaluate(probe, net)
    frame = probe.rows(0)
    skew, offset = nodes_from(frame, "skew"), nodes_from(frame, "offset")
    assert skew.shape == (1, 2, 2, 7)
    assert 0 < np.nanmean(skew) < 1  # GELU passes more gradient to the right
    assert np.isfinite(offset[..., 0]).all()
    assert frame.filter(pl.col("level") == 3)["in_norm"].null_count() == 0


@pytest.mark.parametrize(
    ("settings", "nulls"),
    [
        ({"depth": 0}, {"grad_skew", "router_offset"}),
        ({"node_output": False}, {"grad_skew", "path_asymmetry"}),
        ({"placement": "sum"}, {"path_asymmetry"}),
        ({"router": "frozen", "routing": "centred"}, set()),
        ({"router_input": "centred"}, set()),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_every_kind_of_layer_is_measured(settings: dict[str, Any], nulls: set[str]) -> None:
    net, probe = model(**settings), Probe()
    probe.attach(net)
    evaluate(probe, net)
    table = probe.tree_rows(0)
    assert dict(table.schema) == TREES_SCHEMA
    missing = {name for name in table.columns if table[name].null_count() == len(table)}
    assert missing - {"in_norm_dead"} == nulls | {"flip_rate", "saturation"}  # dead leaves may or may not exist
    assert all(np.isfinite(v) for v in probe.summary().values())


def test_a_frozen_router_is_measured_by_its_own_responses() -> None:
    net = model(router="frozen")
    tree = net.trees()[0]
    with torch.no_grad():
        tree.w_in[:, :7] = 0  # what nodes contribute no longer says how they decide
    seen = look(net, [tree], batches()[0])[0]
    right = (seen.leaves.long() >> 2) & 1
    assert torch.equal(seen.decisions[..., 0] > 0, right.bool())
    assert 0 < right.float().mean() < 1


def test_watching_changes_nothing() -> None:
    net, probe = model(routing="centred"), Probe()
    probe.attach(net)
    net.train()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    evaluate(probe, net)
    for tree in net.trees():
        tree.finish_step()  # nothing was seen, so that nothing moves
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_model_without_trees_is_nothing_to_watch() -> None:
    probe = Probe()
    probe.attach(torch.nn.Linear(2, 2))
    with probe.held_out():
        probe.watch(torch.zeros(1, 2))
    probe.watch_training()
    assert probe.training_counts() is None


def test_ceilings_by_one_product_and_by_gathered_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = model(depth=5).trees()[0]
    x = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0)) + 1
    product = tree_ceilings(x, tree)
    w, b = tree.router()
    assert b is not None
    z = (x @ w[1].T + b[1]).detach().numpy()
    assert product[1] == metrics.ceiling(z)
    monkeypatch.setattr("ablate.balance.probe.DENSE_NODES", 0)
    # Rounding differs between the two products, so that a token at a median may change sides.
    np.testing.assert_allclose(tree_ceilings(x, tree), product, rtol=1e-3)


def test_parts_survive_an_interruption_and_gain_saturation(tmp_path: Path) -> None:
    net, probe, parts = model(), Probe(), UsageParts(tmp_path / "usage")
    probe.attach(net)
    for step in (0, 10):
        evaluate(probe, net)
        parts.write(step, probe.rows(step), probe.tree_rows(step), probe.leaves)
        with torch.no_grad():
            net.trees()[0].w_in.mul_(-1)
    net.train()(batches(seed=1)[0])
    probe.watch_training()

    again, resumed = Probe(), UsageParts(tmp_path / "usage")
    again.attach(net)
    again.resume(resumed.leaves(10), probe.training_counts())
    for one in (probe, again):
        evaluate(one, net)
    assert again.rows(20).equals(probe.rows(20))
    assert again.tree_rows(20).equals(probe.tree_rows(20))
    parts.write(20, again.rows(20), again.tree_rows(20), again.leaves)

    assert counts_from(parts.usage([0, 10, 20])).shape == (3, 2, 2, 8)
    table = parts.trees([0, 10, 20], 8)
    final = table.filter(step=20)["saturation"].to_numpy()
    assert final == pytest.approx(1)
    first = table.filter(step=0, layer=0, tree=0)["saturation"].item()
    kappa = metrics.saturation(parts.leaves(0), parts.leaves(20), 8)  # type: ignore[arg-type]
    assert first == pytest.approx(kappa[0, 0], abs=1e-6)
    assert parts.usage([]).is_empty()
    assert parts.trees([5], 8).is_empty()
