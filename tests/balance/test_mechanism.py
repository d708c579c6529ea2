from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from ablate.balance.mechanism import SIDE_SCHEMA, auc, predict, side_rows
from ablate.balance.motion import MotionRecorder, motion, snapshots, split
from ablate.balance.usage import MOTION_SCHEMA, rows
from ablate.config import Trial, parse
from ablate.kernels.reference import path_nodes
from ablate.model.transformer import Transformer


def model(**tree: Any) -> Transformer:
    shape = {"d_model": 16, "blocks": 2, "heads": 2, "context": 16}
    return Transformer(parse(Trial, {"model": shape, "tree": {"trees": 2, "depth": 3, "leaf_width": 1} | tree}), 40)


BATCHES = list(torch.randint(0, 40, (2, 8, 16), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "settings", [{}, {"router": "frozen"}, {"routing": "centred", "router_input": "centred"}, {"bias": False}], ids=str
)
def test_router_and_drift_add_up_to_the_change_of_z(settings: dict[str, Any]) -> None:
    net = model(**settings)
    before = snapshots(net, BATCHES)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        for tree in net.trees():
            tree.thresholds.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    after = snapshots(net, BATCHES)
    for old, new in zip(before, after, strict=True):
        margin, router, drift = split(old, new)
        nodes = path_nodes(old.leaves, 3)
        z = [torch.einsum("nd,kmd->nkm", s.x, s.w) + s.shift for s in (old, new)]
        torch.testing.assert_close(margin, z[0].gather(2, nodes), rtol=0, atol=1e-12)
        torch.testing.assert_close(router + drift, (z[1] - z[0]).gather(2, nodes), rtol=0, atol=1e-12)
        # What decided is what is split: the leaves follow from the margins.
        assert torch.equal((margin[..., 0] > 0).long(), old.leaves >> 2)
    if settings.get("router") == "frozen":
        assert all(torch.equal(a.w, b.w) for a, b in zip(before, after, strict=True))


def test_each_cause_alone_is_named() -> None:
    net = model()
    before = snapshots(net, BATCHES)
    with torch.no_grad():
        net.trees()[1].w_in.mul_(1.5)
    table = motion(before, snapshots(net, BATCHES), since=0, step=10)
    assert dict(table.schema) == MOTION_SCHEMA
    assert table.filter(pl.col("layer") == 0)["change"].abs().max() == 0
    second = table.filter(pl.col("layer") == 1)
    assert second["drift_rms"].max() == 0
    assert (second["router_rms"] > 0).all()
    with torch.no_grad():
        net.trees()[1].w_in.div_(1.5)
        net.embedding.mul_(torch.linspace(0.5, 1.5, 16))
    table = motion(before, snapshots(net, BATCHES), since=0, step=10)
    # Dividing by 1.5 again leaves rounding, no more.
    assert (table["router_rms"] < 1e-6).all()
    assert (table["drift_rms"] > 1e-3).all()


def test_the_recorder_splits_neighbouring_evaluations_node_by_node() -> None:
    net = model()
    recorder = MotionRecorder()
    assert recorder(0, net, BATCHES).is_empty()
    old = snapshots(net, BATCHES)[1]
    with torch.no_grad():
        net.trees()[1].w_in.add_(0.1)
    resumed = MotionRecorder()
    resumed.load_state_dict(recorder.state_dict())
    table = recorder(20, net, BATCHES)
    assert resumed(20, net, BATCHES).equals(table)
    assert table["step"].unique().to_list() == [20]
    assert recorder(40, net, BATCHES)["change"].abs().max() == 0
    new = snapshots(net, BATCHES)[1]
    row = table.filter(step=20, since=0, layer=1, tree=1, level=1, index=1).row(0, named=True)
    here = (old.leaves[:, 1] >> 2) == 1
    z, later = ((s.x[here] @ s.w[1, 2] + s.shift[1, 2]).numpy() for s in (old, new))
    assert row["tokens"] == here.sum()
    assert row["right"] == pytest.approx((z > 0).mean())
    assert row["right_after"] == pytest.approx((later > 0).mean())
    assert row["sd"] == pytest.approx(z.std())
    assert row["change"] == pytest.approx((later - z).mean()) == pytest.approx(row["router"] + row["drift"])


def test_trees_without_nodes_do_not_move() -> None:
    net = model(depth=0)
    assert motion(snapshots(net, BATCHES), snapshots(net, BATCHES), since=0, step=1).is_empty()


def usage() -> pl.DataFrame:
    """One tree of four leaves: the root and its right child keep both sides, its left child loses its right side."""
    skew, offset = np.array([[[0.1, 0.4, -0.2]]]), np.array([[[0.0, 0.5, 0.6]]])
    start = rows(10, "held_out", np.array([[[300, 100, 350, 250]]]), skew=skew, offset=offset)
    return pl.concat([start, rows(20, "held_out", np.array([[[498, 2, 300, 200]]]), skew=skew, offset=offset)])


def test_sides_with_what_became_of_them() -> None:
    table = side_rows(usage(), 7, step=10)
    assert dict(table.schema) == SIDE_SCHEMA
    assert len(table) == 6
    lost = table.filter(pl.col("lost"))
    assert lost.select("seed", "level", "index", "right", "fuller").rows() == [(7, 1, 0, True, False)]
    assert lost["log_share"].item() == pytest.approx(np.log(0.25))
    assert lost["log_traffic"].item() == pytest.approx(np.log(0.4))
    assert lost["offset"].item() == pytest.approx(0.5)
    assert lost["skew"].item() == pytest.approx(0.4)
    kept = table.filter(level=1, index=0, right=False)
    assert kept["skew"].item() == pytest.approx(-0.4)
    with pytest.raises(ValueError, match="before the last"):
        side_rows(usage(), 7, step=20)


def test_nodes_that_were_lopsided_or_hardly_seen_are_left_out() -> None:
    skew = np.zeros((1, 1, 3))
    start = rows(0, "held_out", np.array([[[900, 60, 20, 20]]]), skew=skew, offset=skew)
    end = rows(5, "held_out", np.array([[[500, 500, 20, 20]]]))
    # Root 960 | 40 and left node 900 | 60 are lopsided, the right node has 40 tokens.
    assert side_rows(pl.concat([start, end]), 0, step=0).is_empty()


def planted(effect: float, seeds: int = 6, sides: int = 600, draw: int = 0) -> pl.DataFrame:
    """Sides that are lost by their share, and by their skew as far as `effect` goes; seeds differ in level."""
    rng = np.random.default_rng(draw)
    frames = []
    for seed in range(seeds):
        skew, share = rng.normal(0, 0.3, sides), rng.uniform(0.1, 0.9, sides)
        logit = -2 + rng.normal(0, 0.3) - 1.5 * np.log(share / 0.5) + effect * skew
        columns = {
            "seed": np.full(sides, seed),
            "layer": rng.integers(0, 4, sides),
            "tree": rng.integers(0, 4, sides),
            "level": rng.integers(0, 6, sides),
            "index": np.zeros(sides, dtype=np.int64),
            "right": rng.random(sides) < 0.5,
            "log_share": np.log(share),
            "log_traffic": rng.normal(size=sides),
            "offset": rng.random(sides),
            "fuller": share > 0.5,
            "skew": skew,
            "lost": rng.random(sides) < 1 / (1 + np.exp(-logit)),
        }
        frames.append(pl.DataFrame(columns, schema=SIDE_SCHEMA, strict=False))
    return pl.concat(frames)


def test_a_planted_effect_of_skew_is_found() -> None:
    found = predict(planted(effect=4.0))
    assert found.seeds == tuple(range(6))
    assert found.gain > 0.03
    assert found.interval[0] > 0
    assert found.p < 0.01
    # Log odds per standard deviation of skew: 4 · 0.3.
    assert found.coefficient == pytest.approx(1.2, abs=3 * found.coefficient_error)
    assert found.gain == pytest.approx(np.mean(found.auc_skew) - np.mean(found.auc_base))
    assert found.p == pytest.approx(stats.ttest_rel(found.auc_skew, found.auc_base).pvalue)


def test_no_effect_is_not_found_though_share_predicts() -> None:
    found = predict(planted(effect=0.0, draw=1))
    assert np.mean(found.auc_base) > 0.65
    assert abs(found.gain) < 0.01
    assert found.p > 0.05
    assert abs(found.coefficient) < 3 * found.coefficient_error


def test_seeds_without_both_outcomes_cannot_be_held_out() -> None:
    table = planted(effect=1.0, seeds=4).with_columns(lost=pl.col("lost") & (pl.col("seed") > 1))
    with pytest.raises(ValueError, match="2 seeds"):
        predict(table)


def test_auc_equals_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(pairs))
