"""Attention equals its definition, head by head, bit for bit: published trials are reproduced by it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.config import Model
from ablate.model.transformer import ROPE_BASE, Attention, unit


def turned(x: Tensor) -> Tensor:
    """Rotary positions on one projection [B, H, T, w]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * ROPE_BASE ** (-torch.arange(half) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def by_definition(attention: Attention, x: Tensor) -> Tensor:
    batch, time, d = x.shape
    q, k, v = F.linear(x, attention.qkv).view(batch, time, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    if attention.qk_norm:
        q, k = unit(q), unit(k)
    y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
    return F.linear(y.transpose(1, 2).reshape(batch, time, d), attention.out)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "time", "heads"), [(3, 24, 2), (1, 1, 4), (2, 7, 1)])
def test_attention_and_its_gradients_are_the_definitions(
    batch: int, time: int, heads: int, dtype: torch.dtype, qk_norm: bool
) -> None:
    model = Model(d_model=16, heads=heads, context=24, blocks=2, qk_norm=qk_norm)
    attention = Attention(model, torch.Generator().manual_seed(0)).to(dtype)
    x, gy = torch.randn(2, batch, time, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    found, wanted = attention(x), by_definition(attention, x)
    assert torch.equal(found, wanted)
    inputs = (x, attention.qkv, attention.out)
    pairs = zip(torch.autograd.grad(found, inputs, gy), torch.autograd.grad(wanted, inputs, gy), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
