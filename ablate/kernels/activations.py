"""The activation family phi(z) = gain · (f(z) + s·f(-z)) and its exact moments.

Written as phi = (1-s) f_odd + (1+s) f_even, the mirror s moves gradient asymmetry, mean slope, parity and gain together;
`unit_gain` and `asymmetry` let a study hold one of them still.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels.spec import ACTIVATIONS, Activation, is_identity


def base(z: Tensor, activation: Activation) -> Tensor:
    """The base function f, elementwise."""
    match activation:
        case "gelu":
            return F.gelu(z)
        case "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        case "relu":
            return F.relu(z)
        case "relu2":
            return F.relu(z).square()
        case "silu":
            return F.silu(z)
        case "tanh":
            return torch.tanh(z)
    raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def base_slope(z: Tensor, activation: Activation) -> Tensor:
    """f'(z), elementwise; at the kink of ReLU it is 0, as in PyTorch."""
    match activation:
        case "gelu":
            return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        case "gelu_tanh":
            c, a = math.sqrt(2 / math.pi), 0.044715
            t = torch.tanh(c * (z + a * z**3))
            return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * a * z * z)
        case "relu":
            return (z > 0).to(z.dtype)
        case "relu2":
            return 2 * F.relu(z)
        case "silu":
            g = torch.sigmoid(z)
            return g * (1 + z * (1 - g))
        case "tanh":
            return 1 - torch.tanh(z).square()
    raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def phi(z: Tensor, activation: Activation, mirror: float = 0.0, gain: float = 1.0) -> Tensor:
    """gain · (f(z) + mirror·f(-z)), elementwise.

    Where that is the identity it is computed as such: f(z) - f(-z) in floating point would only nearly be z.
    """
    if is_identity(activation, mirror):
        out = z
    elif mirror == 0.0:
        out = base(z, activation)
    else:
        out = base(z, activation) + mirror * base(-z, activation)
    return out if gain == 1.0 else gain * out


def phi_slope(z: Tensor, activation: Activation, mirror: float = 0.0, gain: float = 1.0) -> Tensor:
    """Derivative of `phi` with respect to z, elementwise."""
    if is_identity(activation, mirror):
        out = torch.ones_like(z)
    elif mirror == 0.0:
        out = base_slope(z, activation)
    else:
        out = base_slope(z, activation) - mirror * base_slope(-z, activation)
    return out if gain == 1.0 else gain * out


@functools.cache
def _quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights on z > 0 for expectations under z ~ N(0, 1); weights sum to one half.

    Composite Gauss-Legendre over [0, 12]: every f is smooth on either side of zero, so halves are integrated apart.
    """
    import numpy as np  # only here: the kernels run on a machine that has PyTorch alone

    nodes, weights = np.polynomial.legendre.leggauss(40)
    edges = np.linspace(0.0, 12.0, 25)
    half = (edges[1:] - edges[:-1])[:, None] / 2
    z = (edges[:-1, None] + half * (nodes + 1)).ravel()
    w = (half * weights).ravel() * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return torch.from_numpy(z), torch.from_numpy(w)


@functools.cache
def unit_gain(activation: Activation, mirror: float) -> float:
    """1 / sqrt(E[phi(z)²]) for z ~ N(0, 1): the factor that `gain: unit` multiplies by."""
    if is_identity(activation, mirror):
        return 1.0
    z, w = _quadrature()
    second = (w * (phi(z, activation, mirror) ** 2 + phi(-z, activation, mirror) ** 2)).sum()
    return float(second.rsqrt())


@functools.cache
def asymmetry(activation: Activation, mirror: float) -> float:
    """Nominal gradient asymmetry G = (E[|phi'| | z>0] - E[|phi'| | z<0]) / (their sum), z ~ N(0, 1).

    ReLU 1, GELU 0.69, SiLU 0.59; 0 for tanh and for |mirror| = 1.
    """
    z, w = _quadrature()
    right = float((w * phi_slope(z, activation, mirror).abs()).sum())
    left = float((w * phi_slope(-z, activation, mirror).abs()).sum())
    return (right - left) / (right + left)
