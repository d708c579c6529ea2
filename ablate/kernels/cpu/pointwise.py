"""phi and its slope over short arrays, compiled by Numba: branch-free loops that LLVM turns into SIMD.

In float32 erf and exp are polynomials (relative error below 4e-7; the C library's are scalar calls, which cost more
than the layer's products); in float64 they are the C library's. Because GELU, SiLU and ReLU satisfy f(-z) = f(z) - z,
f(z) + s·f(-z) is (1 + s)·f(z) - s·z: the mirror costs nothing.
"""

# Numba compiles these functions; it does not read annotations, and mypy sees its decorators as untyped.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator, call-arg"
from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from ablate.kernels.cpu.jit import jit
from ablate.kernels.spec import Activation, is_identity

LINEAR, GELU, GELU_TANH, RELU, RELU2, SILU, TANH = range(7)
CODES: dict[Activation, int] = {
    "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU, "relu2": RELU2, "silu": SILU, "tanh": TANH,
}  # fmt: skip
"""What the kernels call an activation by; LINEAR is phi(z) = gain · z."""

_jit = jit(fastmath={"contract"})
_f = np.float32
_SQRT_HALF, _DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
_TANH_C, _TANH_A = math.sqrt(2 / math.pi), 0.044715


def code(activation: Activation, mirror: float, gain: float) -> tuple[float, float, float]:
    """Return one row of the kernels' table of activations: code, mirror, gain. Raise ValueError for an unknown one."""
    if activation not in CODES:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(CODES)}")
    if is_identity(activation, mirror):
        return float(LINEAR), 0.0, gain
    return float(CODES[activation]), mirror, gain


@intrinsic
def _power_of_two(typingctx: Any, n: Any) -> Any:
    """2^n as float32 for int32 n in [-126, 127], by writing the exponent's bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(args[0], ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(ir.IntType(32), 23)), ir.FloatType())

    return types.float32(types.int32), codegen


@_jit
def _exp32(x):
    """exp for float32, as in the Cephes library: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]."""
    x = min(max(x, _f(-87.0)), _f(88.0))
    shift = _f(12582912.0)  # 1.5 · 2^23: adding it rounds to an integer
    n = (x * _f(1.44269504088896341) + shift) - shift
    r = x - n * _f(0.693359375)
    r = r + n * _f(2.12194440e-4)
    p = _f(1.9875691500e-4)
    p = p * r + _f(1.3981999507e-3)
    p = p * r + _f(8.3334519073e-3)
    p = p * r + _f(4.1665795894e-2)
    p = p * r + _f(1.6666665459e-1)
    p = p * r + _f(5.0000001201e-1)
    return (p * r * r + r + _f(1.0)) * _power_of_two(np.int32(n))


@_jit
def _erf32(x):
    """erf for float32: the rational approximation of Eigen and XLA; beyond 3.8325 it is 1 to the last bit."""
    s = x * x
    p = _f(-2.72614225801306e-10)
    p = p * s + _f(2.77068142495902e-08)
    p = p * s + _f(-2.10102402082508e-06)
    p = p * s + _f(-5.69250639462346e-05)
    p = p * s + _f(-7.34990630326855e-04)
    p = p * s + _f(-2.95459980854025e-03)
    p = p * s + _f(-1.60960333262415e-02)
    q = _f(-1.45660718464996e-05)
    q = q * s + _f(-2.13374055278905e-04)
    q = q * s + _f(-1.68282697438203e-03)
    q = q * s + _f(-7.37332916720468e-03)
    q = q * s + _f(-1.42647390514189e-02)
    y = x * p / q
    y = _f(1.0) if x > _f(3.8325) else y
    return _f(-1.0) if x < _f(-3.8325) else y


def _exp(x):
    """exp in the argument's own precision; only compiled code calls it."""
    raise NotImplementedError


def _erf(x):
    """erf in the argument's own precision; only compiled code calls it."""
    raise NotImplementedError


@overload(_exp)
def _exp_of(x):
    return (lambda x: _exp32(x)) if x == types.float32 else (lambda x: math.exp(x))


@overload(_erf)
def _erf_of(x):
    return (lambda x: _erf32(x)) if x == types.float32 else (lambda x: math.erf(x))


@_jit
def _logistic(x, one):
    return one / (one + _exp(-x))


@_jit
def phi(z, n, act, out):
    """out[:n] = gain · (f(z) + mirror · f(-z)) with act = (code, mirror, gain); NaN for an unknown code."""
    t = out.dtype.type
    kind, s, gain = int(act[0]), t(act[1]), t(act[2])
    keep, drop = gain * (t(1) + s), gain * s
    if kind == LINEAR:
        for i in range(n):
            out[i] = gain * z[i]
    elif kind == GELU:
        for i in range(n):
            out[i] = keep * z[i] * (t(0.5) + t(0.5) * _erf(t(_SQRT_HALF) * z[i])) - drop * z[i]
    elif kind == GELU_TANH:
        for i in range(n):
            v = z[i]
            out[i] = keep * v * _logistic(t(2 * _TANH_C) * (v + t(_TANH_A) * v * v * v), t(1)) - drop * v
    elif kind == RELU:
        for i in range(n):
            out[i] = keep * max(z[i], t(0)) - drop * z[i]
    elif kind == RELU2:
        for i in range(n):
            out[i] = z[i] * z[i] * (gain if z[i] > 0 else drop)
    elif kind == SILU:
        for i in range(n):
            out[i] = keep * z[i] * _logistic(z[i], t(1)) - drop * z[i]
    elif kind == TANH:
        for i in range(n):
            out[i] = gain * (t(2) * _logistic(t(2) * z[i], t(1)) - t(1))
    else:
        out[:n] = t(np.nan)


@_jit
def slope(z, n, act, out):
    """out[:n] = d phi / dz with act = (code, mirror, gain); at ReLU's kink f' is 0, as in PyTorch; NaN for an unknown code."""
    t = out.dtype.type
    kind, s, gain = int(act[0]), t(act[1]), t(act[2])
    keep, drop = gain * (t(1) + s), gain * s
    if kind == LINEAR:
        for i in range(n):
            out[i] = gain
    elif kind == GELU:
        for i in range(n):
            v = z[i]
            below = t(0.5) + t(0.5) * _erf(t(_SQRT_HALF) * v)
            out[i] = keep * (below + v * t(_DENSITY) * _exp(t(-0.5) * v * v)) - drop
    elif kind == GELU_TANH:
        for i in range(n):
            v = z[i]
            u = t(2 * _TANH_C) * (v + t(_TANH_A) * v * v * v)
            # 1 - g would keep no digits of a tail that is multiplied by v cubed.
            g, rest = _logistic(u, t(1)), _logistic(-u, t(1))
            inner = t(2 * _TANH_C) * (t(1) + t(3 * _TANH_A) * v * v)
            out[i] = keep * (g + v * g * rest * inner) - drop
    elif kind == RELU:
        for i in range(n):
            # f'(z) - s·f'(-z), both 0 at the kink: not f'(z) - s·(1 - f'(z)) there.
            out[i] = gain if z[i] > 0 else (-drop if z[i] < 0 else t(0))
    elif kind == RELU2:
        for i in range(n):
            out[i] = t(2) * z[i] * (gain if z[i] > 0 else drop)
    elif kind == SILU:
        for i in range(n):
            v = z[i]
            g = _logistic(v, t(1))
            out[i] = keep * g * (t(1) + v * (t(1) - g)) - drop
    elif kind == TANH:
        for i in range(n):
            g = _logistic(t(2) * z[i], t(1))
            out[i] = gain * t(4) * g * (t(1) - g)
    else:
        out[:n] = t(np.nan)
