"""The dense feed-forward: one hidden layer with the same activation family and initialisation as the trees."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ablate.config import Dense
from ablate.kernels.activations import phi, unit_gain


class DenseFeedForward(nn.Module):
    """phi(x w_in^T + b) w_out over x [..., d], without an output bias, as in the trees; width 4 d where not given."""

    def __init__(self, d_model: int, dense: Dense, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.dense = dense
        self.width = dense.width or 4 * d_model
        self.gain = unit_gain(dense.activation, dense.mirror) if dense.gain == "unit" else 1.0
        bound_in, bound_out = 1 / math.sqrt(d_model), 1 / math.sqrt(self.width)
        self.w_in = nn.Parameter(torch.empty(self.width, d_model).uniform_(-bound_in, bound_in, generator=generator))
        self.b = (
            nn.Parameter(torch.empty(self.width).uniform_(-bound_in, bound_in, generator=generator))
            if dense.bias
            else None
        )
        self.w_out = nn.Parameter(torch.empty(self.width, d_model).uniform_(-bound_out, bound_out, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., d] of x [..., d]."""
        z = nn.functional.linear(x, self.w_in, self.b)
        return phi(z, self.dense.activation, self.dense.mirror, self.gain) @ self.w_out
