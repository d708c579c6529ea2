from __future__ import annotations

import pytest
import torch

from ablate.config import Train, Trial
from ablate.model.transformer import Transformer
from ablate.training.optimizer import TreeAdamW
from ablate.training.schedule import learning_rate


def small(**tree: object) -> Transformer:
    trial = Trial.model_validate(
        {"model": {"d_model": 16, "blocks": 1, "heads": 2}, "tree": {"trees": 2, "depth": 3, "leaf_width": 2, **tree}}
    )
    return Transformer(trial, 300)


def one_step(model: Transformer, train: Train) -> None:
    optimizer = TreeAdamW(model, train)
    ids = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]))
    optimizer.step()


def test_equals_plain_adamw_when_nothing_is_special() -> None:
    ours, plain = small(), small()
    one_step(ours, Train(lr=0.01, weight_decay=0.1))
    matrices = [p for n, p in plain.named_parameters() if p.ndim >= 2 and not n.endswith(".b")]
    rest = [p for n, p in plain.named_parameters() if p.ndim < 2 or n.endswith(".b")]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95)
    )
    ids = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(torch.nn.functional.cross_entropy(plain(ids[:, :-1])[0], ids[0, 1:]))
    optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_decay_rows_active_leaves_rows_without_gradient_alone() -> None:
    for rows, shrinks in (("all", True), ("active", False)):
        model = small()
        layer = model.trees()[0]
        before = layer.w_out.detach().clone()
        one_step(model, Train(lr=0.01, decay_rows=rows))
        assert layer.w_out.grad is not None
        idle = (layer.w_out.grad == 0).all(-1)
        assert 0 < idle.sum() < idle.numel()
        assert torch.equal(layer.w_out[idle], before[idle]) is not shrinks


def test_tree_decay_replaces_weight_decay_for_trees_only() -> None:
    decayed, plain, embedding = small(), small(), small().embedding.detach()
    one_step(decayed, Train(lr=0.01, weight_decay=0.5, tree_decay=0.0))
    one_step(plain, Train(lr=0.01, weight_decay=0.0))
    for a, b in zip(decayed.trees()[0].parameters(), plain.trees()[0].parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(decayed.embedding - plain.embedding, -0.01 * 0.5 * embedding, rtol=1e-3, atol=1e-7)


def test_frozen_node_rows_never_move() -> None:
    model = small(node_output=False)
    layer = model.trees()[0]
    before = layer.w_in.detach().clone()
    one_step(model, Train(lr=0.01, weight_decay=0.5))
    assert torch.equal(layer.w_in[:, :7], before[:, :7])
    assert not torch.equal(layer.w_in[:, 7:], before[:, 7:])


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_node_lr_scale_multiplies_the_step_of_node_rows_only(scale: float) -> None:
    moves = []
    for factor in (1.0, scale):
        model = small()
        layer = model.trees()[0]
        then = [p.detach().clone() for p in layer.parameters()]
        one_step(model, Train(lr=0.01, node_lr_scale=factor))
        moves.append([p.detach() - t for p, t in zip(layer.parameters(), then, strict=True)])
    for plain, scaled in zip(*moves, strict=True):
        torch.testing.assert_close(scaled[:, :7], scale * plain[:, :7], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(scaled[:, 7:], plain[:, 7:])


def test_schedules() -> None:
    cosine = [learning_rate(Train(steps=100, lr=1.0, warmup=0.1, final_lr=0.1), s) for s in range(101)]
    assert cosine[0] == pytest.approx(0.1)
    assert max(cosine) == pytest.approx(1.0)
    assert cosine[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine[100] == pytest.approx(0.1)
    flat = [
        learning_rate(Train(steps=100, lr=1.0, warmup=0.1, final_lr=0.0, schedule="trapezoid"), s) for s in range(101)
    ]
    assert flat[10:80] == [1.0] * 70
    assert flat[90] == pytest.approx(0.5)
    assert flat[100] == 0.0
