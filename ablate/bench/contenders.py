"""What the layer is measured against: the same tokens through other layers, each written as well as we can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels import reference
from ablate.kernels.op import tree_feedforward
from ablate.kernels.spec import TreeSpec
from ablate.model.moe import top1

log = logging.getLogger(__name__)

TRAFFIC_LIMIT = 2e10
"""Bytes that one timed call of fastfeedforward may move; a share of the tokens is timed where all would move more."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest RMS error relative to the RMS size, of the tree against the reference, and of one contender's two forms."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer and its batch: `tokens` N, `d`, and the tree; W units in each leaf."""

    name: str
    tokens: int
    d: int
    trees: int
    depth: int
    leaf_width: int

    @property
    def spec(self) -> TreeSpec:
        """The tree layer: GELU, nodes contribute."""
        return TreeSpec(trees=self.trees, depth=self.depth, leaf_width=self.leaf_width)

    @property
    def total_units(self) -> int:
        """U, units in all."""
        return self.trees * self.spec.in_rows

    @property
    def active_units(self) -> int:
        """A, units that one token uses."""
        return self.trees * self.spec.path

    @property
    def experts(self) -> int:
        """How many experts of A units hold about U units."""
        return max(1, round(self.total_units / self.active_units))

    def flops(self, units: int, *, backward: bool) -> int:
        """Multiply-adds count two: N·units rows in and out, and twice that again for the gradients."""
        return (12 if backward else 4) * self.tokens * units * self.d


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A layer y = call(x) with its parameters; `units` that a token uses, for counting useful flops.

    `train` is the call whose gradients are taken, where that is not `call`.
    """

    call: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    units: int
    train: Callable[[Tensor], Tensor] | None = None
    forward_share: float = 1.0
    train_share: float = 1.0
    """Share of the tokens that is timed, where cost is linear in tokens and all would take minutes; 0 leaves it out."""


def tokens(shape: Shape, routing: str, device: str, dtype: torch.dtype) -> Tensor:
    """x [N, d]: `iid` standard normal; `skewed` with a common mean as large as the spread, as normed streams have.

    A common mean tips every node towards one side, so few leaves take most tokens.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape.tokens, shape.d, generator=g)
    if routing == "skewed":
        x += torch.randn(shape.d, generator=g)
    return x.to(device, dtype)


def build(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Contender]:
    """All contenders by name, in the order of the table. Weights are filled with normal numbers."""
    g = torch.Generator().manual_seed(0)
    spec, d = shape.spec, shape.d

    def weight(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size, generator=g) * scale).to(device, dtype).requires_grad_()

    def dense(units: int) -> Contender:
        w1, b1, w2 = weight(units, d, scale=d**-0.5), weight(units, scale=0.1), weight(d, units, scale=units**-0.5)
        return Contender(call=lambda x: F.linear(F.gelu(F.linear(x, w1, b1)), w2), parameters=[w1, b1, w2], units=units)

    w_in = weight(spec.trees, spec.in_rows, d, scale=d**-0.5)
    b = weight(spec.trees, spec.in_rows, scale=0.1)
    w_out = weight(spec.trees, spec.out_rows, d, scale=shape.active_units**-0.5)
    weights = [w_in, b, w_out]
    built = {
        "tree": Contender(
            call=lambda x: tree_feedforward(x, w_in, b, w_out, spec).y, parameters=weights, units=shape.active_units
        ),
        "dense_total": dense(shape.total_units),
        "dense_4d": dense(4 * d),
        "dense_active": dense(shape.active_units),
        "masked": Contender(
            call=lambda x: masked(x, w_in, b, w_out, spec), parameters=weights, units=shape.total_units
        ),
    }
    fast = _fastfeedforward(shape, device, dtype)
    if fast is not None:
        built["fastfeedforward"] = fast
    built["moe_top1"] = _mixture(shape, weight)
    return built


def masked(x: Tensor, w_in: Tensor, b: Tensor, w_out: Tensor, spec: TreeSpec) -> Tensor:
    """The published way of training: every unit by two dense products, then a mask. Equal to the tree layer."""
    z = F.linear(x, w_in.flatten(0, 1), b.flatten()).view(-1, spec.trees, spec.in_rows)
    leaves = reference.walk(z.detach()[..., : spec.nodes], None, spec.depth)
    mask = torch.zeros_like(z).scatter_(2, reference.path_rows(leaves, spec), 1.0)
    return (F.gelu(z) * mask).flatten(1) @ w_out.flatten(0, 1)


def _fastfeedforward(shape: Shape, device: str, dtype: torch.dtype) -> Contender | None:
    """PyPI's `fastfeedforward` with our depth, leaf width and number of trees; its nodes only route.

    Evaluation routes hard, in a loop over tokens; training mixes all leaves softly through a tensor [N, L, d].
    """
    try:
        from fastfeedforward import FFF  # type: ignore[import-untyped]
    except ImportError:
        log.warning("fastfeedforward is not installed (pip install 'ablate[bench]'): left out")
        return None
    if shape.depth == 0:
        return None
    layers = [
        FFF(shape.d, shape.leaf_width, shape.d, shape.depth, activation=torch.nn.GELU()) for _ in range(shape.trees)
    ]
    layers = [layer.to(device, dtype) for layer in layers]

    def run(x: Tensor, *, training: bool) -> Tensor:
        total = torch.zeros_like(x)
        for layer in layers:
            total = total + layer.train(training)(x)
        return total

    # Training writes [n, L, d] leaf by leaf, and the gradient of each such write copies all of it.
    moved = shape.trees * shape.spec.leaves**2 * shape.d * 4
    able = min(shape.tokens, 1 << int(TRAFFIC_LIMIT / moved).bit_length() - 1) if moved < TRAFFIC_LIMIT else 0
    if able < 16:
        log.warning("fastfeedforward: training moves %.0f GB a token at shape %s: left out", moved / 1e9, shape.name)
        able = 0
    return Contender(
        call=lambda x: run(x, training=False),
        parameters=[p for layer in layers for p in layer.parameters() if p.requires_grad],
        units=shape.active_units,
        train=lambda x: run(x, training=True),
        forward_share=min(1.0, 256 / shape.tokens),
        train_share=able / shape.tokens,
    )


def _mixture(shape: Shape, weight: Callable[..., Tensor]) -> Contender:
    """A top-1 mixture of experts, each as wide as a tree's active units, as many as hold the tree's units in all."""
    d, width, experts = shape.d, shape.active_units, shape.experts
    router = weight(experts, d, scale=d**-0.5)
    w1, b1 = weight(experts, width, d, scale=d**-0.5), weight(experts, width, scale=0.1)
    w2 = weight(experts, width, d, scale=width**-0.5)
    return Contender(
        call=lambda x: top1(x, router, w1, b1, w2, F.gelu)[0], parameters=[router, w1, b1, w2], units=width
    )


def assert_correct(shape: Shape, contenders: dict[str, Contender], x: Tensor) -> None:
    """The tree and the masked layer against the reference, outputs and all gradients, over the whole batch.

    Raises AssertionError. The reference runs 512 tokens at a time, on the leaves that the tree took; of those, all but
    one in a thousand must be the ones the masked layer's responses lead to.
    """
    spec = shape.spec
    w_in, b, w_out = contenders["tree"].parameters
    x = x.detach().requires_grad_()
    gy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    out = tree_feedforward(x, w_in, b, w_out, spec)
    grads = torch.autograd.grad(out.y, (x, w_in, b, w_out), gy)
    want_y, want_x = torch.empty_like(out.y), torch.empty_like(x)
    wants = [torch.zeros_like(t, dtype=torch.float32) for t in (w_in, b, w_out)]
    same = 0
    for start in range(0, shape.tokens, 512):
        s = slice(start, start + 512)
        xs = x.detach()[s].requires_grad_()
        y, leaves, _ = reference.forward(xs, w_in, b, w_out, None, out.leaves[s], spec)
        want_y[s] = y.detach()
        want_x[s], *rest = torch.autograd.grad(y, (xs, w_in, b, w_out), gy[s])
        for total, grad in zip(wants, rest, strict=True):
            total += grad
        with torch.no_grad():
            routed = reference.route(xs, w_in, b, None, spec)[0]
        same += int((routed == leaves).sum())
        if start == 0 and x.dtype == torch.float32:
            _assert_close(
                "masked", masked(xs, w_in, b, w_out, spec)[(routed == leaves).all(1)], y[(routed == leaves).all(1)]
            )
    assert same >= 0.999 * out.leaves.numel(), f"leaves agree for {same} of {out.leaves.numel()}"
    names = ("y", "gradient of x", "gradient of w_in", "gradient of b", "gradient of w_out")
    for name, got, want in zip(names, (out.y, *grads), (want_y, want_x, *wants), strict=True):
        _assert_close(f"tree: {name}", got, want)


def _assert_close(name: str, got: Tensor, want: Tensor) -> None:
    error = (got.float() - want.float()).square().mean().sqrt() / want.float().square().mean().sqrt()
    assert error <= TOLERANCE[got.dtype], f"{name}: relative RMS error {float(error):.2e} against the reference"
