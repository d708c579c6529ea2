"""Placing the neurons of a dense MLP in trees, so that the tree layer starts close to the MLP (`init: dense`).

Per tree, one after the other, each on what the earlier ones left uncovered:

1. Nodes, top down. At a node, the neurons that fire together on its tokens form two clusters; the node's vector is
   fitted (ridge regression) to send a token towards the cluster that matters more to it, its bias halves the node's
   tokens. Alternating the two steps is two-means with a linear boundary; MoEfication (arXiv 2110.01786) clusters
   co-activated neurons in the same spirit, but without a tree and into disjoint experts.
2. Leaves. A leaf takes the W neurons that matter most to the tokens it gets; a neuron may be in several leaves.
3. Outputs. Rows of w_out start as the neurons' own and are refitted together (ridge, towards where they started), so
   that the layer's output is closest to the MLP's; nodes start at 0. What is left of the mean goes into the wrapper's
   bias.

N tokens, F dense neurons, d width; the tree's letters as everywhere (K, D, L, M, W, U, R).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ablate.config import ConfigError, Tree
from ablate.kernels import reference
from ablate.kernels.activations import base
from ablate.kernels.spec import TreeSpec
from ablate.model.mlps import DenseMlp
from ablate.model.tree import tree_spec

DIRECTIONS = 256
"""Principal directions of the inputs in which node vectors are fitted."""
ALTERNATIONS = 4
PROFILE = 256
"""Neurons looked at when a node is fitted: those with most energy there."""
SAMPLE = 4096
"""Tokens looked at when a node is fitted."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties tried for the outputs, relative to the mean squared response; a fifth of the tokens decides."""


@dataclass(frozen=True)
class Placement:
    """Weights of a tree layer, and of the wrapper's bias; float32."""

    w_in: Tensor
    """[K, M + L·W, d]."""
    b: Tensor
    """[K, M + L·W]."""
    w_out: Tensor
    """[K, R, d]."""
    bias: Tensor
    """[d]."""
    neurons: Tensor
    """int64 [K, L, W]: the dense neuron in each leaf unit."""


def check(mlp: DenseMlp, tree: Tree) -> None:
    """Raise ConfigError, naming the setting, where dense neurons cannot be placed in such a tree."""
    wanted = {"activation": mlp.activation, "mirror": 0.0, "gain": "raw", "placement": "unit", "bias": True}
    for field, value in wanted.items():
        if getattr(tree, field) != value:
            given = getattr(tree, field)
            raise ConfigError(f"tree.{field} is {given!r}: init 'dense' needs {value!r} for this model's MLPs")
    if tree.leaf_width > mlp.w_in.shape[0]:
        raise ConfigError(f"tree.leaf_width is {tree.leaf_width}: the MLP has {mlp.w_in.shape[0]} units")


def is_exact(mlp: DenseMlp, tree: Tree) -> bool:
    """Whether the tree can hold the MLP as it is: depth 0 with as many units, and no gate."""
    return tree.depth == 0 and tree.trees * tree.leaf_width == mlp.w_in.shape[0] and not mlp.gated


def copy_exactly(mlp: DenseMlp, tree: Tree) -> Placement:
    """The MLP, its neurons in their own order, as K leaves of width F / K."""
    k, w, d = tree.trees, tree.leaf_width, mlp.w_in.shape[1]
    rows = torch.arange(k * w).view(k, 1, w)
    return Placement(mlp.w_in.view(k, w, d), mlp.b_in.view(k, w), mlp.w_out.view(k, w, d), mlp.b_out, rows)


@torch.no_grad()
def place(mlp: DenseMlp, tree: Tree, x: Tensor, *, shuffled: bool = False, seed: int = 0) -> Placement:
    """Place an MLP's neurons by their activity on tokens x [N, d]; deterministic for one seed and number of threads.

    `shuffled` is the control: neurons in random leaves under random node vectors (that halve their tokens too), then
    the same fit of the outputs. Time O(K·D·N·F + N·U²), memory O(N·F + N·U + U²) floats. Raises ConfigError on fewer
    than 2 L tokens.
    """
    check(mlp, tree)
    if is_exact(mlp, tree):
        return copy_exactly(mlp, tree)
    n, d = x.shape
    if n < 2 * tree.leaves:
        raise ConfigError(f"calibration fits on {n} tokens: depth {tree.depth} needs at least {2 * tree.leaves}")
    generator = torch.Generator().manual_seed(seed)
    spec = tree_spec(tree)
    hidden = mlp.hidden(x)
    # What a neuron adds to the output beyond its mean, which the bias takes over: energy |h - mean|² |w_out|².
    energy = (hidden - hidden.mean(0)).square_().mul_(mlp.w_out.square().sum(1))
    w_in = x.new_zeros(spec.trees, spec.in_rows, d)
    b = x.new_zeros(spec.trees, spec.in_rows)
    neurons = torch.empty(spec.trees, spec.leaves, spec.leaf_width, dtype=torch.int64)
    inputs = _Inputs(x)
    deal = _Deal(mlp.w_in.shape[0], generator)
    for k in range(spec.trees):
        node_w, node_b, at = _grow(inputs, energy, spec, generator, shuffled)
        w_in[k, : spec.nodes], b[k, : spec.nodes] = node_w, node_b
        for leaf in range(spec.leaves):
            tokens = (at == leaf).nonzero().flatten()
            if shuffled:
                neurons[k, leaf] = deal.take(spec.leaf_width)
                continue
            share = energy[tokens].sum(0) if tokens.numel() else energy.sum(0)
            neurons[k, leaf] = share.topk(spec.leaf_width).indices
            energy[tokens[:, None], neurons[k, leaf]] = 0  # covered: later trees look at what is left
    rows = neurons.flatten(1)
    w_in[:, spec.nodes :], b[:, spec.nodes :] = mlp.w_in[rows], mlp.b_in[rows]
    first = spec.nodes if spec.node_output else 0
    w_out = x.new_zeros(spec.trees, spec.out_rows, d)
    w_out[:, first:] = mlp.w_out[rows]
    if mlp.gated:
        w_out[:, first:] *= _gate_scale(mlp, hidden, x)[rows][..., None]
    thresholds = None
    if tree.router_input == "centred":
        # Decisions will be moved by <w, mean>: moving the biases along keeps them where they were fitted.
        thresholds = w_in[:, : spec.nodes] @ x.mean(0)
        b[:, : spec.nodes] += thresholds
    w_out, bias = _fit_outputs(mlp, x, w_in, b, w_out, thresholds, spec)
    return Placement(w_in, b, w_out, bias, neurons)


class _Inputs:
    """Tokens x [N, d], whitened in their p main directions: c [N, p] = x @ basis [d, p] - offset [p]."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / x.shape[0])
        kept = min(DIRECTIONS, x.shape[1], int((values > values[-1] * 1e-6).sum()))
        self.basis = vectors[:, -kept:] / values[-kept:].sqrt()
        self.offset = mean @ self.basis
        self.c = x @ self.basis - self.offset


class _Deal:
    """Neurons in random order; shuffled again when all are used."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.left = torch.empty(0, dtype=torch.int64)

    def take(self, wanted: int) -> Tensor:
        if self.left.numel() < wanted:
            self.left = torch.randperm(self.count, generator=self.generator)
        hand, self.left = self.left[:wanted], self.left[wanted:]
        return hand


def _grow(
    inputs: _Inputs, energy: Tensor, spec: TreeSpec, generator: torch.Generator, shuffled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Node vectors [M, d] and biases [M] of one tree, and the leaf of every token, int64 [N]."""
    x = inputs.x
    w, b = x.new_zeros(spec.nodes, x.shape[1]), x.new_zeros(spec.nodes)
    at = torch.zeros(x.shape[0], dtype=torch.int64)
    for node in range(spec.nodes):
        tokens = (at == node).nonzero().flatten()
        sample = tokens[:: max(1, tokens.numel() // SAMPLE)]
        direction = None if shuffled or tokens.numel() < 4 else _split(inputs.c[sample], energy[sample])
        if direction is None:
            direction = torch.randn(inputs.c.shape[1], generator=generator)
        w[node] = inputs.basis @ direction
        if not tokens.numel():
            w[node] /= w[node].norm().clamp(min=1e-12)
            continue
        z = x[tokens] @ w[node]
        scale = z.std(correction=0)
        scale = scale if scale > 0 else z.new_ones(())
        w[node], z = w[node] / scale, z / scale  # node responses of spread 1 on their own tokens
        b[node] = -_middle(z)
        at[tokens] = 2 * node + 1 + (z + b[node] > 0).long()
    return w, b, at - spec.nodes


def _split(c: Tensor, energy: Tensor) -> Tensor | None:
    """A direction [p] that splits tokens c [n, p] by the neurons they use, from energies [n, F]; None if they agree."""
    kept = energy.sum(0).topk(min(PROFILE, energy.shape[1])).indices
    e = energy[:, kept]
    profile = e / e.sum(1, keepdim=True).clamp(min=1e-20)
    profile = profile - profile.mean(0)
    v = profile.square().sum(0).sqrt()
    for _ in range(8):  # power iteration: the main direction in which the tokens' profiles differ
        v = profile.T @ (profile @ v)
        norm = v.norm()
        if norm == 0:
            return None
        v = v / norm
    score = profile @ v
    n, p = c.shape
    mean = c.mean(0)
    centred = c - mean
    # Whitened over all tokens; a node sees few of them, so the penalty grows as they get fewer than the directions.
    gram = centred.T @ centred / n + (0.01 + p / n) * torch.eye(p)
    factor = torch.linalg.cholesky(gram)
    direction = c.new_zeros(p)
    for _ in range(ALTERNATIONS):
        target = (score - score.mean()) / score.std(correction=0).clamp(min=1e-20)
        direction = torch.cholesky_solve((centred.T @ target / n)[:, None], factor)[:, 0]
        z = centred @ direction
        right = (z > _middle(z)).to(e.dtype)
        if not 0 < right.sum() < n:
            return None
        # Neurons join the side where they matter more; a token's score is what the right cluster has over the left.
        cluster = ((right @ e) / right.sum() > ((1 - right) @ e) / (1 - right).sum()).to(e.dtype)
        score = (e @ cluster).sqrt() - (e @ (1 - cluster)).sqrt()
    return direction


def _middle(z: Tensor) -> Tensor:
    ordered = z.sort().values
    half = ordered.numel() // 2
    return (ordered[max(half - 1, 0)] + ordered[half]) / 2


def _gate_scale(mlp: DenseMlp, hidden: Tensor, x: Tensor) -> Tensor:
    """[F]: the best constant in place of a gated neuron's second factor, sum of h f / sum of f²."""
    f = base(torch.nn.functional.linear(x, mlp.w_in, mlp.b_in), mlp.activation)
    return (hidden * f).sum(0) / f.square().sum(0).clamp(min=1e-20)


def _features(x: Tensor, w_in: Tensor, b: Tensor, thresholds: Tensor | None, spec: TreeSpec) -> Tensor:
    """Activations of all units that have an output row, 0 off the path: [N, K·R], as y = features @ w_out."""
    columns = []
    for k in range(spec.trees):
        z = x @ w_in[k].T + b[k]
        leaves = reference.walk(z[:, None, : spec.nodes], None if thresholds is None else thresholds[k], spec.depth)
        rows = reference.path_rows(leaves, spec)[:, 0]
        mask = torch.zeros(z.shape, dtype=torch.bool).scatter_(1, rows, True)
        h = base(z, spec.activation) * mask
        columns.append(h if spec.node_output else h[:, spec.nodes :])
    return torch.cat(columns, dim=1)


def _fit_outputs(
    mlp: DenseMlp, x: Tensor, w_in: Tensor, b: Tensor, w_out: Tensor, thresholds: Tensor | None, spec: TreeSpec
) -> tuple[Tensor, Tensor]:
    """w_out [K, R, d] and bias [d] closest to the MLP's output on x [N, d], ridge towards the w_out given."""
    features, target = _features(x, w_in, b, thresholds, spec), mlp(x)
    start = w_out.flatten(0, 1)
    left = target - features @ start
    cut = x.shape[0] - x.shape[0] // 5
    best, least = RIDGES[-1], float("inf")
    for ridge, change, bias in _ridge(features[:cut], left[:cut], RIDGES):
        error = float((left[cut:] - features[cut:] @ change - bias).square().sum())
        if error < least:
            best, least = ridge, error
    ((_, change, bias),) = _ridge(features, left, (best,))
    return (start + change).view_as(w_out), bias


def _ridge(features: Tensor, target: Tensor, ridges: tuple[float, ...]) -> list[tuple[float, Tensor, Tensor]]:
    """(penalty, coefficients [U, d], intercept [d]) of centred ridge regressions, in float64."""
    n = features.shape[0]
    mean_f, mean_t = features.mean(0), target.mean(0)
    gram = (features.T @ features).double() / n - torch.outer(mean_f.double(), mean_f.double())
    cross = (features.T @ target).double() / n - torch.outer(mean_f.double(), mean_t.double())
    scale = gram.diagonal().mean().clamp(min=1e-20)
    fits = []
    for ridge in ridges:
        regular = gram.clone()
        regular.diagonal().add_(ridge * scale)
        change = torch.cholesky_solve(cross, torch.linalg.cholesky(regular)).to(features.dtype)
        fits.append((ridge, change, mean_t - mean_f @ change))
    return fits
