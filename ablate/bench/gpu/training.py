"""Whole training steps of a small transformer on a GPU: trees beside dense layers, launched one by one and compiled.

The model is written here in plain PyTorch, of the sizes of the presets: `ablate.model` needs packages that a bare
machine may lack. Attention, norms and loss are the same for all contenders.
"""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.bench.gpu.lane import Rows, Setup
from ablate.bench.gpu.measure import seconds_of
from ablate.kernels.op import tree_feedforward
from ablate.kernels.spec import TreeSpec

VOCABULARY = 2048
SEQUENCES = {"nano": 32, "small": 32}
CONTENDERS = ("tree", "dense_total", "dense_4d", "dense_active")


@functools.cache
def presets() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the presets of `ablate.config`, read from their file: the package around it needs pydantic."""
    found: dict[str, dict[str, dict[str, Any]]] = runpy.run_path(
        str(Path(__file__).parents[2] / "config" / "presets.py")
    )["PRESETS"]
    return found


class TreeLayer(nn.Module):
    """The tree feed-forward over x [..., d]."""

    def __init__(self, d: int, spec: TreeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.w_in = nn.Parameter(torch.randn(spec.trees, spec.in_rows, d) * d**-0.5)
        self.b = nn.Parameter(torch.zeros(spec.trees, spec.in_rows))
        self.w_out = nn.Parameter(torch.randn(spec.trees, spec.out_rows, d) * (spec.trees * spec.path) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., d]. Weights are cast to the type of x: the kernels take one type."""
        w_in, b, w_out = (w.to(x.dtype) for w in (self.w_in, self.b, self.w_out))
        y: Tensor = tree_feedforward(x.flatten(0, -2), w_in, b, w_out, self.spec, backend="triton").y
        return y.view_as(x)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream; x [B, T, d]."""

    def __init__(self, d: int, heads: int, feedforward: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.feedforward = feedforward

    def forward(self, x: Tensor) -> Tensor:
        """Return the new residual stream."""
        batch, time, d = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, time, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, d))
        out: Tensor = x + self.feedforward(self.second(x))
        return out


def _feedforward(contender: str, d: int, spec: TreeSpec) -> nn.Module:
    if contender == "tree":
        return TreeLayer(d, spec)
    units = {"dense_total": spec.trees * spec.in_rows, "dense_4d": 4 * d, "dense_active": spec.trees * spec.path}
    width = units[contender]
    return nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, d, bias=False))


class Model(nn.Module):
    """Mean cross-entropy of next tokens, of ids [B, T + 1]."""

    def __init__(self, preset: str, contender: str, blocks: int) -> None:
        super().__init__()
        sizes, tree = presets()[preset]["model"], presets()[preset]["tree"]
        d, spec = sizes["d_model"], TreeSpec(**tree)
        self.embedding = nn.Embedding(VOCABULARY, d)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(d, sizes["heads"], _feedforward(contender, d, spec)) for _ in range(blocks))
        self.norm = nn.RMSNorm(d)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the loss."""
        x = self.embedding(ids[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight.to(x.dtype))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def steps(setup: Setup) -> Rows:
    """Time whole training steps (bf16 weights, AdamW) of the nano and the small preset; `loss_falls` over 20 steps."""
    rows: Rows = []
    for preset in ("nano",) if setup.dry else ("nano", "small"):
        sizes = presets()[preset]["model"]
        time, batch, blocks = (8, 2, 1) if setup.dry else (sizes["context"], SEQUENCES[preset], sizes["blocks"])
        ids = torch.randint(0, VOCABULARY, (batch, time + 1), generator=torch.Generator().manual_seed(0)).to(
            setup.device
        )
        for compiled in (False,) if setup.dry else (False, True):
            of_mode = []
            for contender in CONTENDERS:
                torch.manual_seed(0)
                row: dict[str, Any] = {"preset": preset, "contender": contender, "compiled": compiled}
                try:
                    model = Model(preset, contender, blocks).to(
                        setup.device, torch.float32 if setup.dry else torch.bfloat16
                    )
                    step = _step(model, ids, compiled=compiled, fused=not setup.dry)
                    losses = [float(step()) for _ in range(2 if setup.dry else 20)]
                    seconds = seconds_of(setup, {contender: step})[contender]
                # Compilation needs a compiler that a bare machine may lack: the other rows are still measured.
                except Exception as error:
                    of_mode.append(row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
                    continue
                of_mode.append(
                    row
                    | {
                        "seconds": seconds,
                        "tokens_per_second": batch * time / seconds,
                        "first_loss": losses[0],
                        "last_loss": losses[-1],
                        "loss_falls": losses[-1] < losses[0],
                    }
                )
            tree = of_mode[0].get("seconds")
            rows += [
                row | ({"times_tree": row["seconds"] / tree} if tree and "seconds" in row else {}) for row in of_mode
            ]
    return rows


def _step(model: Model, ids: Tensor, *, compiled: bool, fused: bool) -> Callable[[], Tensor]:
    """Return a function that takes one optimizer step and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    loss_of = torch.compile(model) if compiled else model

    def step() -> Tensor:
        loss: Tensor = loss_of(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
