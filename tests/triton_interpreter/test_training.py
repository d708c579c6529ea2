"""The layer inside a model: one optimizer step of a tiny transformer, against the reference backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ablate import config
from ablate.model.transformer import Transformer
from ablate.model.tree import TreeFeedForward


def step(trial: config.Trial, backend: str) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """Loss, weights after one AdamW step, and leaves taken by each tree layer."""
    model = Transformer(trial, vocab_size=40)
    layers = [m for m in model.modules() if isinstance(m, TreeFeedForward)]
    for layer in layers:
        layer.backend = backend
    tokens = torch.randint(0, 40, (2, 17), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    optimizer.step()
    leaves = [m.last_leaves for m in layers if m.last_leaves is not None]
    return float(loss.detach()), {n: p.detach() for n, p in model.named_parameters()}, leaves


@pytest.mark.parametrize("placement", ["unit", "tree"])
def test_one_training_step_ends_where_the_reference_does(placement: str) -> None:
    trial = config.parse(
        config.Trial,
        {
            "model": {"d_model": 32, "heads": 2, "blocks": 2, "context": 16},
            "tree": {"trees": 2, "depth": 4, "leaf_width": 2, "placement": placement},
        },
        where="trial",
    )
    loss, weights, leaves = step(trial, "triton")
    want_loss, want, want_leaves = step(trial, "reference")
    assert len(leaves) == len(want_leaves) == 2
    for ours, theirs in zip(leaves, want_leaves, strict=True):
        assert torch.equal(ours, theirs)
    assert loss == pytest.approx(want_loss, rel=1e-6)
    for name, weight in weights.items():
        assert torch.allclose(weight, want[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("router", ["frozen", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_decides_and_computes_in_bfloat16(router: str, dtype: torch.dtype) -> None:
    """Also with an input that autocast has already rounded, as the layer before it leaves one."""
    torch.manual_seed(0)
    layer = TreeFeedForward(32, trees=2, depth=3, leaf_width=2, router=router, backend="triton")
    x = torch.randn(20, 32).bfloat16().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    low = TreeFeedForward(32, layer.tree, backend="triton")
    low.load_state_dict(layer.state_dict())
    want = low.bfloat16()(x.bfloat16())
    want.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    assert layer.last_leaves is not None
    assert low.last_leaves is not None
    assert torch.equal(layer.last_leaves, low.last_leaves)
    for ours, theirs in zip(layer.parameters(), low.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad.float())
