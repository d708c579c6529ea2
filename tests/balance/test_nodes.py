from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ablate.balance.nodes import NodeSums, node_gradients, row_norms
from ablate.kernels import reference
from ablate.kernels.activations import phi_slope
from ablate.model.tree import TreeFeedForward


def layer(**settings: Any) -> TreeFeedForward:
    tree = TreeFeedForward(
        5, trees=2, depth=3, leaf_width=2, **settings, backend="reference", generator=torch.Generator().manual_seed(0)
    )
    return tree.double()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mirror": 0.5, "node_mirror": -0.3, "gain": "unit", "activation": "silu"},
        {"placement": "tree"},
        {"placement": "sum", "mirror": 1.0, "gain": "unit"},
        {"node_backward": "flat"},
        {"node_backward": "flip"},
        {"node_backward": "base", "mirror": -1.0},
        {"mirror": -1.0, "placement": "sum"},
    ],
    ids=str,
)
def test_node_gradients_are_what_autograd_gives_the_biases(settings: dict[str, Any]) -> None:
    tree = layer(**settings)
    x, gy = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert tree.b is not None
    expected = []
    for one, g in zip(x, gy, strict=True):  # with one token the gradient of b_n is its dz_n
        (grad,) = torch.autograd.grad(tree(one[None]), tree.b, g[None])
        assert tree.last_leaves is not None
        slots = ((tree.last_leaves[0].long()[:, None] + 8) >> torch.tensor([3, 2, 1])) - 1
        expected.append(grad.gather(1, slots))
    tree(x)
    assert tree.last_leaves is not None
    assert tree.last_responses is not None
    got = node_gradients(
        gy, tree.w_out.detach(), tree.last_leaves, tree.last_responses, tree.spec, tree.tree.node_backward
    )
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_gradients_of_nodes_without_output_are_refused() -> None:
    tree = layer(node_output=False)
    with pytest.raises(ValueError, match="node_output"):
        node_gradients(torch.ones(1, 5), tree.w_out, torch.zeros(1, 2), torch.zeros(1, 2, 5), tree.spec)


def test_skew_offset_and_asymmetry_equal_a_loop_over_tokens() -> None:
    tree = layer()
    tokens = 900
    generator = torch.Generator().manual_seed(2)
    x, gy = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    thresholds = 0.1 * torch.randn(2, 7, generator=generator, dtype=torch.float64)
    w_in, b, w_out = (t.detach() for t in (tree.w_in, tree.b, tree.w_out) if t is not None)
    z = torch.einsum("nd,kud->nku", x, w_in) + b
    _, leaves, responses = reference.forward(x, w_in, b, w_out, thresholds, None, tree.spec)
    sums = NodeSums(tree.spec)
    for part in (slice(0, 100), slice(100, 100), slice(100, tokens)):
        sums.add(leaves[part], responses[part, :, :3], thresholds)
        sums.add_gradients(x[part], gy[part], w_out, leaves[part], responses[part])

    skew, offset = np.full((2, 7), np.nan), np.full((2, 7), np.nan)
    for k in range(2):
        for n in range(7):
            level = int(math.log2(n + 1))
            reached = [t for t in range(tokens) if (int(leaves[t, k]) + 8) >> (3 - level) == n + 1]
            seen = np.array([float(z[t, k, n] - thresholds[k, n]) for t in reached])
            push = np.array(
                [
                    abs(float(gy[t] @ w_out[k, n]) * float(phi_slope(z[t, k, n], "gelu"))) * float(x[t].norm())
                    for t in reached
                ]
            )
            right, left = push[seen > 0], push[seen <= 0]
            if len(reached) >= 30:
                offset[k, n] = abs(seen.mean()) / seen.std()
            if min(len(right), len(left)) >= 30:
                skew[k, n] = (right.mean() - left.mean()) / (right.mean() + left.mean())
    assert np.isnan(skew).any()
    assert np.isfinite(skew).sum() >= 4
    np.testing.assert_allclose(sums.skew(), skew, rtol=1e-9)
    np.testing.assert_allclose(sums.offset(), offset, rtol=1e-9)

    slope = phi_slope(responses, "gelu").abs()
    up, down = float(slope[responses > 0].mean()), float(slope[responses <= 0].mean())
    assert sums.path_asymmetry() == pytest.approx((up - down) / (up + down))


def test_a_constant_response_has_no_offset() -> None:
    tree = layer()
    sums = NodeSums(tree.spec)
    sums.add(torch.full((100, 2), 7), torch.full((100, 2, 3), 0.1), None)
    assert np.isnan(sums.offset()).all()


def test_row_norms_of_nodes_and_leaves() -> None:
    for node_output in (True, False):
        tree = layer(node_output=node_output)
        in_norm, out_norm = row_norms(tree.w_in, tree.w_out, tree.spec)
        assert in_norm.shape == out_norm.shape == (2, 15)
        assert in_norm[1, 3] == pytest.approx(float(tree.w_in[1, 3].detach().norm()))
        assert in_norm[1, 7 + 2] == pytest.approx(float(tree.w_in[1, 7 + 4 : 7 + 6].detach().norm()))
        first = 7 if node_output else 0
        assert out_norm[0, 7 + 5] == pytest.approx(float(tree.w_out[0, first + 10 : first + 12].detach().norm()))
        assert np.isnan(out_norm[:, :7]).all() != node_output
