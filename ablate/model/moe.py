"""A top-1 mixture of experts: an outside reference for trees, not part of the answer without auxiliary losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.kernels.activations import phi, unit_gain

if TYPE_CHECKING:
    from ablate.config import Mixture


def top1(
    x: Tensor,
    router: Tensor,
    w_in: Tensor,
    b: Tensor | None,
    w_out: Tensor,
    act: Callable[[Tensor], Tensor],
    *,
    even: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token through its likeliest expert, scaled by that probability (Switch, arXiv 2101.03961): no capacity.

    Tokens are sorted by expert, so each expert is two products over contiguous rows. `even` gives every expert the same
    number of tokens, for tensors that have shapes and no numbers.

    Args:
        x: [N, d].
        router: [E, d].
        w_in, b, w_out: [E, W, d], [E, W] or None, [E, W, d].

    Returns:
        y [N, d], the router's probabilities [N, E], the experts taken, int64 [N].
    """
    experts = len(router)
    probabilities = F.linear(x, router).softmax(-1)
    gate, chosen = probabilities.max(-1)
    order = chosen.argsort(stable=True)
    rows = x[order]
    parts = (
        rows.tensor_split(experts) if even else torch.split(rows, torch.bincount(chosen, minlength=experts).tolist())
    )
    outs = [
        act(F.linear(part, w_in[e], None if b is None else b[e])) @ w_out[e]
        for e, part in enumerate(parts)
        if len(part)
    ]
    y = torch.empty_like(x).index_copy(0, order, torch.cat(outs)) if outs else x
    return y * gate[:, None], probabilities, chosen


def load_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Switch's load loss E · sum_e f_e P_e: f_e the share of tokens sent to e, P_e its mean probability; 1 when uniform."""
    experts = probabilities.shape[1]
    shares = torch.bincount(chosen, minlength=experts) / len(chosen)
    return experts * (shares * probabilities.mean(0)).sum()


class MixtureFeedForward(nn.Module):
    """`top1` over x [..., d] with the dense layer's initialisation in every expert; width 4 d where not given."""

    def __init__(self, d_model: int, mixture: Mixture, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.mixture = mixture
        self.width = mixture.width or 4 * d_model
        self.gain = unit_gain(mixture.activation, mixture.mirror) if mixture.gain == "unit" else 1.0
        self.load_loss = False
        self.even = False
        """Experts share tokens evenly, whatever the router says: for counting memory without numbers."""
        self.last_load_loss: Tensor | None = None
        bound_in, bound_out = 1 / math.sqrt(d_model), 1 / math.sqrt(self.width)

        def parameter(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))

        self.router = parameter(bound_in, mixture.experts, d_model)
        self.w_in = parameter(bound_in, mixture.experts, self.width, d_model)
        self.b = parameter(bound_in, mixture.experts, self.width) if mixture.bias else None
        self.w_out = parameter(bound_out, mixture.experts, self.width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., d] of x [..., d]; in training with `load_loss` also sets `last_load_loss`."""
        y, probabilities, chosen = top1(
            x.flatten(0, -2), self.router, self.w_in, self.b, self.w_out, self._act, even=self.even
        )
        self.last_load_loss = load_loss(probabilities, chosen) if self.training and self.load_loss else None
        return y.view_as(x)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: the last load loss without its graph, which cannot be copied."""
        loss = self.last_load_loss
        return self.__dict__ | {"last_load_loss": None if loss is None else loss.detach()}

    def _act(self, z: Tensor) -> Tensor:
        return phi(z, self.mixture.activation, self.mixture.mirror, self.gain)
