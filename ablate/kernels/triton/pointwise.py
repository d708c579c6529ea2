"""Triton device code without matrix products: the activation family, its slope, and ordered sums. Jit functions only.

`tl` has no tanh outside libdevice, which the interpreter cannot call, so tanh is written with exp: exact at both ends,
absolute error 1e-7 in between.
"""
# mypy: ignore-errors
# Triton's jit functions take blocks and constexprs that Python's types cannot describe.

import triton
import triton.language as tl


@triton.jit
def _tanh(z):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * z))


@triton.jit
def _base(z, ACT: tl.constexpr):
    """f(z) in fp32; an ACT without a branch here does not compile."""
    if ACT == "gelu":
        out = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        out = 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACT == "relu":
        out = tl.where(z > 0, z, 0.0)
    elif ACT == "relu2":
        out = tl.where(z > 0, z * z, 0.0)
    elif ACT == "silu":
        out = z / (1.0 + tl.exp(-z))
    else:
        tl.static_assert(ACT == "tanh", "an activation without a formula")
        out = _tanh(z)
    return out


@triton.jit
def _base_slope(z, ACT: tl.constexpr):
    """f'(z) in fp32; 0 at the kink of ReLU."""
    if ACT == "gelu":
        out = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        out = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * z * z)
    elif ACT == "relu":
        out = tl.where(z > 0, 1.0, 0.0)
    elif ACT == "relu2":
        out = tl.where(z > 0, 2.0 * z, 0.0)
    elif ACT == "silu":
        g = 1.0 / (1.0 + tl.exp(-z))
        out = g * (1.0 + z * (1.0 - g))
    else:
        tl.static_assert(ACT == "tanh", "an activation without a formula")
        t = _tanh(z)
        out = 1.0 - t * t
    return out


@triton.jit
def phi(z, mirror, gain, ACT: tl.constexpr, MIRRORED: tl.constexpr):
    """gain·(f(z) + mirror·f(-z)); ACT "identity" is gain·z, as in `activations.phi`."""
    if ACT == "identity":
        out = z
    elif MIRRORED:
        out = _base(z, ACT) + mirror * _base(-z, ACT)
    else:
        out = _base(z, ACT)
    return out * gain


@triton.jit
def slope(z, mirror, gain, ACT: tl.constexpr, MIRRORED: tl.constexpr):
    """Derivative of `phi` in z."""
    if ACT == "identity":
        out = z * 0.0 + 1.0
    elif MIRRORED:
        out = _base_slope(z, ACT) - mirror * _base_slope(-z, ACT)
    else:
        out = _base_slope(z, ACT)
    return out * gain


@triton.jit(do_not_specialize=["path", "depth"])
def activate(
    z_ptr,  # [N·K, P] fp32 path responses
    h_ptr,  # [N·K, P] fp32, written
    total,  # N·K·P
    path,
    depth,
    node_mirror,
    node_gain,
    leaf_mirror,
    leaf_gain,
    NODE_ACT: tl.constexpr,
    NODE_MIRRORED: tl.constexpr,
    LEAF_ACT: tl.constexpr,
    LEAF_MIRRORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h = phi(z), with the nodes' mirror and gain in the first D columns of the path and the leaf's in the rest.

    Grid (cdiv(N·K·P, BLOCK),). Ownership: program p alone writes elements [p·BLOCK, (p+1)·BLOCK).
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < total
    z = tl.load(z_ptr + i, mask=m, other=0.0)
    node = phi(z, node_mirror, node_gain, NODE_ACT, NODE_MIRRORED)
    leaf = phi(z, leaf_mirror, leaf_gain, LEAF_ACT, LEAF_MIRRORED)
    tl.store(h_ptr + i, tl.where(i % path < depth, node, leaf), mask=m)


@triton.jit(do_not_specialize=["path", "depth"])
def path_grad(
    z_ptr,  # [N·K, P] fp32 path responses
    dh_ptr,  # [N·K, P] fp32 gradient of the units' outputs; replaced by dz
    h_ptr,  # [N·K, P] fp32, written: phi(z)
    total,
    path,
    depth,
    node_mirror,
    node_gain,
    leaf_mirror,
    leaf_gain,
    NODE_ACT: tl.constexpr,
    NODE_MIRRORED: tl.constexpr,
    LEAF_ACT: tl.constexpr,
    LEAF_MIRRORED: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz = dh·phi'(z) in place and h = phi(z); without node outputs (NODES false) the D node columns of both are 0.

    Grid (cdiv(N·K·P, BLOCK),). Ownership: program p alone reads and writes elements [p·BLOCK, (p+1)·BLOCK).
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < total
    is_node = i % path < depth
    z = tl.load(z_ptr + i, mask=m, other=0.0)
    dh = tl.load(dh_ptr + i, mask=m if NODES else m & (~is_node), other=0.0)
    leaf = phi(z, leaf_mirror, leaf_gain, LEAF_ACT, LEAF_MIRRORED)
    leaf_slope = slope(z, leaf_mirror, leaf_gain, LEAF_ACT, LEAF_MIRRORED)
    if NODES:
        node = phi(z, node_mirror, node_gain, NODE_ACT, NODE_MIRRORED)
        node_slope = slope(z, node_mirror, node_gain, NODE_ACT, NODE_MIRRORED)
    else:
        node = z * 0.0
        node_slope = node
    tl.store(h_ptr + i, tl.where(is_node, node, leaf), mask=m)
    tl.store(dh_ptr + i, dh * tl.where(is_node, node_slope, leaf_slope), mask=m)
