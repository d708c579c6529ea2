"""The shape of ragged trees, as tables.

A link is a node's index where it is >= 0, and leaf number ~link otherwise. Nodes and leaves of all K trees are numbered
through, leaves from left to right, tree after tree. A node whose two branches are the same is always taken: it has its
output and decides nothing. Letters are those of `spec`; n nodes and l leaves in all, R rows = n + l·W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Shape(NamedTuple):
    """Where everything is in the trees of one layer: int64 tensors on the CPU, derived from roots and branches."""

    roots: Tensor
    """[K] links."""
    branches: Tensor
    """[n, 2] links: left, right."""
    split: Tensor
    """[n]: first leaf of the right side; one past the last leaf where the node decides nothing."""
    spans: Tensor
    """[n, 2]: the first leaf under a node and one past the last."""
    paths: Tensor
    """[l, D]: nodes above a leaf, root first, then -1."""
    lengths: Tensor
    """[l]."""
    levels: Tensor
    """[n]: a node's place on its paths."""
    trees: Tensor
    """[K + 1]: where each tree's leaves begin."""
    tree_of: Tensor
    """[n + l]: the tree of each node, then of each leaf."""


def shape_of(roots: Sequence[int] | NDArray[Any], branches: NDArray[Any], depth: int) -> Shape:
    """Return the shape that roots [K] and branches [n, 2] describe, for paths of at most `depth` nodes.

    Raises ValueError where they are no such trees: a node used twice or never, leaves out of order, a path too long.
    """
    nodes, trees = len(branches), len(roots)
    split, spans = np.zeros(nodes, np.int64), np.full((nodes, 2), -1, np.int64)
    levels, node_tree = np.zeros(nodes, np.int64), np.full(nodes, -1, np.int64)
    paths: list[list[int]] = []
    leaf_tree: list[int] = []

    def visit(link: int, tree: int, above: list[int]) -> None:
        if link < 0:
            if ~link != len(paths):
                raise ValueError(f"tree {tree} has leaf {~link} where {len(paths)} is expected, from left to right")
            paths.append(above)
            leaf_tree.append(tree)
            return
        if link >= nodes or node_tree[link] >= 0 or len(above) >= depth:
            raise ValueError(f"tree {tree}: node {link} does not exist, is in two places or below {depth} nodes")
        node_tree[link], levels[link] = tree, len(above)
        left, right = (int(r) for r in branches[link])
        spans[link, 0] = len(paths)
        visit(left, tree, [*above, link])
        split[link] = len(paths)
        if right != left:
            visit(right, tree, [*above, link])
        spans[link, 1] = len(paths)

    starts = []
    for tree, root in enumerate(roots):
        starts.append(len(paths))
        visit(int(root), tree, [])
    if (node_tree < 0).any():
        raise ValueError(f"node {int(np.argmin(node_tree))} belongs to no tree")
    padded = np.full((len(paths), depth), -1, np.int64)
    for leaf, above in enumerate(paths):
        padded[leaf, : len(above)] = above
    arrays = (
        np.asarray(roots, np.int64),
        np.asarray(branches, np.int64).reshape(nodes, 2),
        split,
        spans,
        padded,
        np.array([len(above) for above in paths], np.int64),
        levels,
        np.array([*starts, len(paths)], np.int64),
        np.concatenate([node_tree, np.array(leaf_tree, np.int64)]),
    )
    assert len(arrays[7]) == trees + 1
    return Shape(*(torch.from_numpy(a) for a in arrays))
