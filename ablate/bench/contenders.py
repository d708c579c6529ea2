"""What the layer is measured against: the same tokens through other layers, each written as well as we can."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.kernels import reference
from ablate.kernels.op import tree_feedforward
from ablate.kernels.spec import TreeSpec
from ablate.model.moe import top1

log = logging.getLogger(__name__)

CONTENDERS = {
    "tree": "the tree layer",
    "dense_total": "a dense layer of as many units as the tree has in all",
    "dense_4d": "a dense layer of the usual width, 4 d",
    "dense_active": "a dense layer of as many units as a token uses",
    "dense_total_compiled": "the same through torch.compile",
    "dense_4d_compiled": "the same through torch.compile",
    "dense_active_compiled": "the same through torch.compile",
    "masked": "the tree computed densely, then masked: the published way of training",
    "ultrafastbert": "UltraFastBERT's layer, written again from its paper",
    "fastfeedforward": "the package of that name; takes minutes",
    "moe_top1": "a top-1 mixture of experts of as many units, expert by expert",
    "moe_grouped": "the same by grouped products",
}
"""What is measured, by name, in the order of the tables."""
DEFAULT = tuple(name for name in CONTENDERS if name != "fastfeedforward" and not name.endswith("_compiled"))
"""What `ablate bench layer` measures where nobody chooses: fastfeedforward alone would take longer than all others."""
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


SHAPES = {
    s.name: s
    for s in (
        Shape(name="A", tokens=4096, d=256, trees=4, depth=8, leaf_width=4),
        Shape(name="B", tokens=16384, d=768, trees=1, depth=11, leaf_width=1),
        Shape(name="C", tokens=4096, d=256, trees=8, depth=6, leaf_width=8),
    )
}
"""A and C are training shapes; B is UltraFastBERT's benchmark: 12 levels of units, 4095 in all."""


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

    def moved(self, shape: Shape, itemsize: int, *, backward: bool) -> int:
        """Return the bytes that must move at least once in a pass.

        x and y once, all parameters once (a batch visits nearly every row); twice that and the gradients again for the
        backward pass.
        """
        weights = sum(p.numel() for p in self.parameters) * itemsize
        activations = shape.tokens * shape.d * itemsize
        return 2 * activations + weights + (3 * activations + 2 * weights if backward else 0)


def tokens(shape: Shape, routing: str, device: str, dtype: torch.dtype) -> Tensor:
    """x [N, d]: `iid` standard normal; `skewed` with a common mean as large as the spread, as normed streams have.

    A common mean tips every node towards one side, so few leaves take most tokens.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape.tokens, shape.d, generator=g)
    if routing == "skewed":
        x += torch.randn(shape.d, generator=g)
    return x.to(device, dtype)


def build(
    shape: Shape, device: str, dtype: torch.dtype, names: Sequence[str], *, backend: str = "auto"
) -> dict[str, Contender]:
    """Return the named contenders, the tree first. Weights are normal numbers, the same whichever are named.

    `backend` computes the tree. Names are those of `CONTENDERS`; one that cannot run here is left out, and the log says why.
    """
    g = torch.Generator().manual_seed(0)
    spec, d = shape.spec, shape.d

    def weight(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size, generator=g) * scale).to(device, dtype).requires_grad_()

    def dense(units: int, *, compiled: bool = False) -> Contender:
        g.manual_seed(units)
        w1, b1, w2 = weight(units, d, scale=d**-0.5), weight(units, scale=0.1), weight(d, units, scale=units**-0.5)

        def call(x: Tensor) -> Tensor:
            return F.linear(F.gelu(F.linear(x, w1, b1)), w2)

        return Contender(call=torch.compile(call) if compiled else call, parameters=[w1, b1, w2], units=units)

    w_in = weight(spec.trees, spec.in_rows, d, scale=d**-0.5)
    b = weight(spec.trees, spec.in_rows, scale=0.1)
    w_out = weight(spec.trees, spec.out_rows, d, scale=shape.active_units**-0.5)
    weights = [w_in, b, w_out]
    builders: dict[str, Callable[[], Contender | None]] = {
        "tree": lambda: Contender(
            call=lambda x: tree_feedforward(x, w_in, b, w_out, spec, backend=backend).y,
            parameters=weights,
            units=shape.active_units,
        ),
        "dense_total": lambda: dense(shape.total_units),
        "dense_4d": lambda: dense(4 * d),
        "dense_active": lambda: dense(shape.active_units),
        "dense_total_compiled": lambda: dense(shape.total_units, compiled=True),
        "dense_4d_compiled": lambda: dense(4 * d, compiled=True),
        "dense_active_compiled": lambda: dense(shape.active_units, compiled=True),
        "masked": lambda: Contender(
            call=lambda x: masked(x, w_in, b, w_out, spec), parameters=weights, units=shape.total_units
        ),
        "ultrafastbert": lambda: _ultrafastbert(shape, weight),
        "fastfeedforward": lambda: _fastfeedforward(shape, device, dtype),
        "moe_top1": lambda: _mixture(shape, weight, grouped=False),
        "moe_grouped": lambda: _mixture(shape, weight, grouped=True),
    }
    built = {name: builders[name]() for name in CONTENDERS if name == "tree" or name in names}
    return {name: contender for name, contender in built.items() if contender is not None}


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


def _ultrafastbert(shape: Shape, weight: Callable[..., Tensor]) -> Contender:
    """UltraFastBERT's layer (arXiv 2311.10770, section 2.1, algorithm 1), written again from the paper.

    Every level is a node with one unit, the last included; all nodes of a path contribute by GELU, and the sign of a
    response decides. As many trees as ours, with D + 1 levels: fewer units a token than ours where W is over 1. Each
    level gathers one row a token and takes batched products, as in the paper's PyTorch version.
    """
    d, levels = shape.d, shape.depth + 1
    nodes = (1 << levels) - 1
    w_in, b = weight(shape.trees, nodes, d, scale=d**-0.5), weight(shape.trees, nodes, scale=0.1)
    w_out = weight(shape.trees, nodes, d, scale=(shape.trees * levels) ** -0.5)

    def call(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for tree in range(shape.trees):
            node = torch.zeros(len(x), dtype=torch.long, device=x.device)
            for _ in range(levels):
                z = torch.bmm(w_in[tree][node][:, None], x[:, :, None])[:, 0, 0] + b[tree][node]
                total = total + F.gelu(z)[:, None] * w_out[tree][node]
                node = 2 * node + 1 + (z > 0).long()
        return total

    return Contender(call=call, parameters=[w_in, b, w_out], units=shape.trees * levels)


def _mixture(shape: Shape, weight: Callable[..., Tensor], *, grouped: bool) -> Contender:
    """A top-1 mixture of experts, each as wide as a tree's active units, as many as hold the tree's units in all.

    `grouped`: the products of all experts in one call (`grouped_mm` of PyTorch), without waiting for the device. It takes
    rows of whole 16 bytes, so the experts' width is rounded up to a multiple of 8.
    """
    d, width, experts = shape.d, shape.active_units, shape.experts
    if grouped:
        width += -width % 8
    router = weight(experts, d, scale=d**-0.5)
    w1, b1 = weight(experts, width, d, scale=d**-0.5), weight(experts, width, scale=0.1)
    w2 = weight(experts, width, d, scale=width**-0.5)

    def call(x: Tensor) -> Tensor:
        gate, chosen = F.linear(x, router).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        experts_in_order = chosen[order]
        ends = torch.searchsorted(experts_in_order, torch.arange(experts, device=x.device), right=True).int()
        hidden = F.gelu(F.grouped_mm(x[order], w1.transpose(1, 2), offs=ends) + b1[experts_in_order])
        y = torch.empty_like(x).index_copy(0, order, F.grouped_mm(hidden, w2, offs=ends))
        return y * gate[:, None]

    def loop(x: Tensor) -> Tensor:
        return top1(x, router, w1, b1, w2, F.gelu)[0]

    return Contender(call=call if grouped else loop, parameters=[router, w1, b1, w2], units=width)


def assert_correct(shape: Shape, contenders: dict[str, Contender], x: Tensor, *, backend: str = "auto") -> None:
    """The tree and the masked layer against the reference, outputs and all gradients, over the whole batch.

    Raises AssertionError. The reference runs 512 tokens at a time, on the leaves that the tree took; of those, all but
    one in a thousand must be the ones the masked layer's responses lead to.
    """
    spec = shape.spec
    w_in, b, w_out = contenders["tree"].parameters
    x = x.detach().requires_grad_()
    gy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    out = tree_feedforward(x, w_in, b, w_out, spec, backend=backend)
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
