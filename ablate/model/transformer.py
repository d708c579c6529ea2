"""A decoder-only transformer whose feed-forward is a tree, dense, a mixture of experts, or absent.

Shapes: B sequences, T tokens each, d model width, H heads of width d / H, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ablate.config import Model, Trial
from ablate.model.decode import STEP_TOKENS, Cache, tree_step
from ablate.model.network import Network, child, feedforward
from ablate.model.tree import TreeFeedForward

ROPE_BASE = 10000.0
EMBEDDING_SD = 0.02


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Model, generator: torch.Generator) -> None:
        super().__init__()
        d_model, heads, context, blocks = model.d_model, model.heads, model.context, model.blocks
        self.heads, self.qk_norm = heads, model.qk_norm
        self.qkv = nn.Parameter(torch.empty(3 * d_model, d_model).normal_(0, d_model**-0.5, generator=generator))
        # Scaled down by depth so that the residual stream's variance does not grow with the number of blocks (GPT-2).
        out_sd = (d_model * 2 * blocks) ** -0.5
        self.out = nn.Parameter(torch.empty(d_model, d_model).normal_(0, out_sd, generator=generator))
        half = d_model // heads // 2
        angle = torch.arange(context)[:, None] * ROPE_BASE ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """[B, T, d] of x [B, T, d]; position t sees positions up to t, and before them what a cache holds."""
        batch, time, d = x.shape
        # Turned as they lie, queries and keys together: half the copies of turning each head's own. Every bit is the same.
        qkv = F.linear(x, self.qkv).view(batch, time, 3, self.heads, d // self.heads)
        qk, v = torch.split(qkv, [2, 1], dim=2)
        if self.qk_norm:
            qk = unit(qk)
        qk = self._rotate(qk, slice(0, time) if cache is None else cache.positions)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind()
        v = v[:, :, 0].transpose(1, 2)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cache.attend(layer, q, k, v)
        return F.linear(y.transpose(1, 2).reshape(batch, time, d), self.out)

    def _rotate(self, x: Tensor, at: slice | Tensor) -> Tensor:
        """Rotary positions on [B, T, 2, H, d/H], the same for all rows or [B, T]; halves are the pairs."""
        cos, sin = (table[at][..., None, None, :].to(x.dtype) for table in (self.cos, self.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, trial: Trial, generator: torch.Generator, backend: str) -> None:
        super().__init__()
        model = trial.model
        self.attention_norm = nn.RMSNorm(model.d_model)
        self.attention = Attention(model, generator)
        self.norm = nn.RMSNorm(model.d_model) if model.feedforward != "none" else None
        self.feedforward = feedforward(trial, generator, backend)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """[B, T, d] of x [B, T, d]; `layer` is this block's place in the cache."""
        x = x + self.attention(self.attention_norm(x), cache, layer)
        if self.norm is not None and self.feedforward is not None:
            step = cache.steps[layer] if cache is not None and x.shape[0] * x.shape[1] <= STEP_TOKENS else None
            x = x + (step or self.feedforward)(self.norm(x))
        return x


class Transformer(Network):
    """Logits [B, T, V] of token ids [B, T], V from the tokenizer, T at most the context; embeddings are tied."""

    def __init__(self, trial: Trial, vocab_size: int) -> None:
        super().__init__()
        backend: str = trial.train.backend
        generator = torch.Generator().manual_seed(trial.init_seed)
        embedding = torch.empty(vocab_size, trial.model.d_model).normal_(0, EMBEDDING_SD, generator=generator)
        self.embedding = nn.Parameter(embedding)
        self.blocks = nn.ModuleList(Block(trial, child(generator), backend) for _ in range(trial.model.blocks))
        self.norm = nn.RMSNorm(trial.model.d_model)
        self.context, self.embedding_norm = trial.model.context, trial.model.embedding_norm
        self.checkpointing = trial.train.activation_checkpointing

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [B, T, V] of int64 ids [B, T], which follow what the cache holds (it then holds them too)."""
        return self.logits(self.features(tokens, cache))

    def features(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """What the logits are made of, [B, T, d] of ids [B, T]: for callers that need logits of some positions only."""
        x = F.embedding(tokens, self.embedding)
        if self.embedding_norm:
            x = unit(x)
        if cache is None:
            again = self.checkpointing and self.training and torch.is_grad_enabled()
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        else:
            cache.begin(*tokens.shape)
            for layer, block in enumerate(self.blocks):
                x = block(x, cache, layer)
            cache.advance(tokens.shape[1])
        features: Tensor = self.norm(x)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """[..., V] of features [..., d]."""
        return F.linear(features, self.embedding)

    def cache(self, rows: int, capacity: int | None = None) -> Cache:
        """An empty key-value cache for `rows` sequences of up to `capacity` tokens, the context where not given.

        Raises ValueError where the capacity is over the context.
        """
        context = self.context if capacity is None else capacity
        if context > self.context:
            raise ValueError(f"a cache of {context} positions is longer than the model's context of {self.context}")
        attention = self.blocks[0].attention
        assert isinstance(attention, Attention)
        width = self.embedding.shape[1] // attention.heads
        cache = Cache(len(self.blocks), rows, context, attention.heads, width, self.embedding.detach())
        cache.steps = [
            tree_step(block.feedforward) if isinstance(block.feedforward, TreeFeedForward) else None
            for block in self.blocks
        ]
        return cache


def unit(x: Tensor) -> Tensor:
    """[..., n] of x [..., n], each vector divided by its root mean square; no weights."""
    return F.rms_norm(x, x.shape[-1:])
