"""Routers that stand still: frozen at birth or later, separate from their nodes, slow, or a hash that knows no distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ablate.config import ConfigError, Study, Trial, parse
from ablate.model.counts import count_layer
from ablate.model.decode import tree_step
from ablate.model.ragged import keep
from ablate.model.tree import TreeFeedForward
from ablate.tasks.facts import Facts
from ablate.training.module import TrialModule
from ablate.training.optimizer import TreeAdamW
from ablate.training.trial import run_trial


def facts(**changes: dict[str, Any]) -> Trial:
    sections: dict[str, dict[str, Any]] = {
        "task": {"kind": "facts", "facts": 600, "classes": 8},
        "model": {"d_model": 16, "heads": 1},
        "tree": {"trees": 2, "depth": 3, "leaf_width": 1},
        "train": {"steps": 10, "batch_size": 64, "eval_every": 5, "lr": 0.01},
    }
    return Trial.model_validate({k: {**v, **changes.get(k, {})} for k, v in sections.items()})


def loss(config: Trial, folder: Path) -> float:
    """Mean training loss of the last five of ten steps."""
    found = run_trial(config, data_root=folder, folder=folder, threads=1).final.train_loss
    assert found is not None
    return found


def test_a_frozen_router_that_follows_to_the_end_is_a_tied_one(tmp_path: Path) -> None:
    follows = facts(tree={"router": "frozen"}, train={"router_steps": 10})
    assert loss(follows, tmp_path / "a") == pytest.approx(loss(facts(), tmp_path / "b"), rel=1e-6)
    assert loss(facts(tree={"router": "frozen"}), tmp_path / "c") != pytest.approx(
        loss(facts(), tmp_path / "b"), rel=1e-5
    )


def stepped(config: Trial, steps: int) -> tuple[TreeFeedForward, list[torch.Tensor], list[torch.Tensor]]:
    """A tree after so many steps that move its weights; its router and its nodes before and after each."""
    module = TrialModule(config, Facts(config, Path()))
    (tree,) = module.model.trees()
    routers, nodes = [tree.router()[0].clone()], [tree.w_in[:, : tree.spec.nodes].detach().clone()]
    for step in range(steps):
        with torch.no_grad():
            tree.w_in.add_(0.1)
        if step < config.train.router_steps:
            tree.follow_nodes(config.train.router_rate)
        routers.append(tree.router()[0].clone())
        nodes.append(tree.w_in[:, : tree.spec.nodes].detach().clone())
    return tree, routers, nodes


def test_a_router_follows_for_its_steps_by_its_rate_and_then_stands_still() -> None:
    _, routers, nodes = stepped(facts(tree={"router": "frozen"}, train={"router_steps": 3}), 5)
    assert all(torch.equal(r, n) for r, n in zip(routers[:4], nodes[:4], strict=True))
    assert torch.equal(routers[5], nodes[3])
    _, routers, nodes = stepped(facts(tree={"router": "frozen"}, train={"router_steps": 5, "router_rate": 0.25}), 5)
    mean = nodes[0].clone()
    for step in range(1, 6):
        mean.lerp_(nodes[step], 0.25)
        torch.testing.assert_close(routers[step], mean)


def test_a_separate_router_is_drawn_apart_and_leaves_the_weights_as_they_were() -> None:
    plain, _, _ = stepped(facts(), 0)
    tree, routers, _ = stepped(facts(tree={"router": "separate"}, train={"steps": 4}), 4)
    start, _, _ = stepped(facts(tree={"router": "separate"}), 0)
    assert torch.equal(start.w_in, plain.w_in)
    assert torch.equal(start.w_out, plain.w_out)
    assert torch.equal(routers[0], routers[4])
    assert tree.router_w is not None
    cosine = torch.cosine_similarity(
        tree.router_w.flatten(), start.w_in[:, : tree.spec.nodes].detach().flatten(), dim=0
    )
    assert abs(cosine.item()) < 0.25
    assert 0.8 < tree.router_w.abs().max().item() * 4 <= 1  # U(±1/sqrt d), as nodes start


def test_hashed_leaves_are_even_fixed_and_know_no_distance() -> None:
    tree = TreeFeedForward(32, trees=3, depth=4, leaf_width=2, router="hash")
    x = torch.randn(16_000, 32, generator=torch.Generator().manual_seed(0))
    y = tree(x)
    leaves = tree.last_leaves
    assert leaves is not None
    for k in range(3):
        counts = torch.bincount(leaves[:, k].long(), minlength=16)
        assert (counts - 1000).abs().max() < 5 * 1000**0.5
    other, again = tree(2 * x), tree.last_leaves
    assert again is not None
    assert torch.equal(again, leaves), "only signs count"
    near = x.clone()
    near[:, 0] *= -1
    tree(near)
    assert tree.last_leaves is not None
    assert (tree.last_leaves == leaves).float().mean().item() == pytest.approx(1 / 16, abs=0.01)
    assert y.shape == other.shape
    assert not torch.equal(leaves[:, 0], leaves[:, 1])
    decided = tree.last_decisions
    assert decided is not None
    right = decided > 0
    assert torch.equal((right * torch.tensor([8, 4, 2, 1])).sum(-1), tree.last_leaves.long())


def test_what_needs_a_routers_weights_is_refused_with_a_hash() -> None:
    tree = TreeFeedForward(16, trees=1, depth=2, router="hash")
    assert tree_step(tree) is None
    with pytest.raises(ConfigError, match="router is 'hash': a hash knows no subtrees"):
        keep(tree, torch.ones(1, 4).bool().numpy())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"tree": {"router": "hash", "routing": "centred"}}, "base.tree: routing is 'centred', router_input 'raw': router 'hash' takes"),
        ({"tree": {"router": "hash"}, "train": {"motion": True}}, "base: train.motion is True: tree.router 'hash' has no weights"),
        ({"train": {"router_steps": 5}}, "base: train.router_steps is 5: it needs tree.router 'frozen'"),
        ({"train": {"router_rate": 0.5}}, "base.train: router_rate is 0.5: it needs router_steps"),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)  # fmt: skip
def test_routers_that_cannot_be_are_refused_in_one_line(base: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(Study, {"name": "s", "base": base, "factors": {"tree.mirror": [0, 1]}})
    assert message in str(error.value)


@pytest.mark.parametrize("router", ["fixed", "separate", "hash"])
def test_trials_whose_routers_never_learn_run_and_resume(router: str, tmp_path: Path) -> None:
    config = facts(tree={"router": router}, train={"checkpoint_every": 3})
    result = run_trial(config, data_root=tmp_path, folder=tmp_path / router, threads=1)
    assert result.status == "finished"
    assert result.final.balance["n_eff_frac"] > 0.5
    assert ("ceiling" in result.final.balance) == (router != "hash")


@pytest.mark.parametrize("losses", [{}, {"load_loss": 0.1, "region_leak": 0.1}], ids=["", "auxiliary"])
def test_nodes_of_a_fixed_router_keep_their_input_weights_and_learn_their_output(losses: dict[str, float]) -> None:
    config = facts(tree={"router": "fixed"}, train={"weight_decay": 0.1, **losses})
    module = TrialModule(config, Facts(config, Path()))
    (tree,) = module.model.trees()
    nodes, optimizer = tree.spec.nodes, TreeAdamW(module.model, config.train)
    tree.region_leak, tree.load_loss = config.train.region_leak, bool(config.train.load_loss)
    before = {name: p.detach().clone() for name, p in tree.named_parameters()}
    tree(torch.randn(64, 16, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    optimizer.step()
    moved = {name: (p.detach() != before[name]).any(-1) for name, p in tree.named_parameters() if name != "b"}
    assert tree.b is not None
    assert torch.equal(tree.b[:, :nodes], before["b"][:, :nodes])
    assert not torch.equal(tree.b[:, nodes:], before["b"][:, nodes:])
    assert not moved["w_in"][:, :nodes].any()
    assert moved["w_in"][:, nodes:].all()
    assert moved["w_out"].all()


def test_new_settings_of_training_leave_published_hashes_alone() -> None:
    assert not {"router_steps", "router_rate"} & Trial().train.model_dump().keys()
    late = facts(tree={"router": "frozen"}, train={"router_steps": 5})
    assert Trial.model_validate_json(late.model_dump_json()) == late


def test_a_router_apart_from_nodes_that_contribute_costs_products_of_its_own() -> None:
    def weights(**tree: Any) -> int:
        return count_layer(facts(tree=tree)).active_weights

    rows = 2 * 3  # trees x depth
    assert weights(router="frozen") - weights() == weights(router="separate") - weights() == rows * 16
    assert weights() == weights(router="fixed") == weights(router="hash")
    # Nodes that only route have no responses of their own: the router's are the only ones.
    assert weights(router="frozen", node_output=False) == weights(node_output=False)
