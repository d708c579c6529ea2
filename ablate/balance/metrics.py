"""Balance metrics, as pure functions of leaf counts [..., L] (numpy only; torch is not imported here).

Leading axes are arbitrary (steps, layers, trees). p_l is leaf l's share of the tokens counted, N their number, L = 2^D.
A tree that saw no token has no balance: every share-based metric is NaN there. Sources: arXiv
2408.15664 (MaxVio), 1701.06538 (CV²), 2409.02060 Eq. 5 (saturation; here corrected for chance).
"""

# Longer than 400 lines because every metric is defined in one file, and they share helpers.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

DEAD_SHARE = 0.01
"""A leaf is dead where its share is under DEAD_SHARE / L."""
COLLAPSE_BITS = 0.5
"""A layer has collapsed where bits_lost, mean over its trees, is above this."""
MIN_SIDE = 30
"""Tokens a side that a node needs for gradient skew and router offset; below it they are null."""


def depth_of(leaves: int) -> int:
    """D of a tree with `leaves` = 2^D leaves; raises ValueError for another number."""
    if leaves < 1 or leaves & (leaves - 1):
        raise ValueError(f"counts have {leaves} leaves: a power of two is expected")
    return leaves.bit_length() - 1


def node_counts(counts: ArrayLike) -> list[Ints]:
    """Tokens that reached each position, level by level: [..., 1], [..., 2], … [..., L], left to right."""
    level = np.asarray(counts)
    levels = [level]
    for _ in range(depth_of(level.shape[-1])):
        level = level[..., ::2] + level[..., 1::2]
        levels.append(level)
    return levels[::-1]


def shares(counts: ArrayLike) -> Floats:
    """p [..., L]; NaN where no token was counted."""
    c = np.asarray(counts, dtype=np.float64)
    total = c.sum(-1, keepdims=True)
    out: Floats = np.divide(c, total, out=np.full_like(c, np.nan), where=total > 0)
    return out


def entropy_nats(counts: ArrayLike, *, corrected: bool = False) -> Floats:
    """H = -Σ p ln p [...], in nats.

    `corrected` adds Miller and Madow's (hit leaves - 1) / 2N against the downward bias of few tokens, up to ln L; it is
    meant for N of at least 64·L (see `resolution`).
    """
    c = np.asarray(counts)
    p = shares(c)
    # 0 + … turns the -0.0 of a one-hot load into 0.
    h: Floats = 0.0 - np.sum(np.multiply(p, np.log(p, out=np.zeros_like(p), where=p > 0)), axis=-1)
    if not corrected:
        return h
    hit, n = (c > 0).sum(-1), c.sum(-1)
    bias = np.divide(hit - 1.0, 2.0 * n, out=np.zeros_like(h), where=n > 0)
    capped: Floats = np.minimum(h + bias, np.log(c.shape[-1]))
    return capped


def n_eff_frac(counts: ArrayLike, *, corrected: bool = False) -> Floats:
    """Effective leaves as a share of L: exp(H) / L [...], from 1/L (one leaf) to 1 (uniform)."""
    c = np.asarray(counts)
    out: Floats = np.exp(entropy_nats(c, corrected=corrected)) / c.shape[-1]
    return out


def bits_lost(counts: ArrayLike) -> Floats:
    """1 - H / (D ln 2) [...]: 0 uniform, 1 one leaf, comparable across depths; 0 for D = 0."""
    c = np.asarray(counts)
    depth = depth_of(c.shape[-1])
    h = entropy_nats(c)
    return np.where(np.isnan(h), np.nan, 0.0) if depth == 0 else 1.0 - h / (depth * np.log(2.0))


def bits_lost_by_level(counts: ArrayLike) -> Floats:
    """What each level of the tree adds to `bits_lost`, [..., D], root first; sums to it exactly.

    H = Σ_d Σ_{n in d} p_n h(r_n), with r_n the share of node n's tokens that went right and h the binary entropy.
    """
    levels = node_counts(counts)
    depth = len(levels) - 1
    total = levels[0][..., 0].astype(np.float64)
    lost = np.empty((*total.shape, depth))
    for d in range(depth):
        n = levels[d].astype(np.float64)
        r = np.divide(levels[d + 1][..., 1::2], n, out=np.zeros_like(n), where=n > 0)
        kept = np.sum(n * _binary_entropy_bits(r), axis=-1)
        kept = np.divide(kept, total, out=np.full_like(total, np.nan), where=total > 0)
        lost[..., d] = (1.0 - kept) / depth
    return lost


def _binary_entropy_bits(r: Floats) -> Floats:
    out = np.zeros_like(r)
    for side in (r, 1.0 - r):
        out -= side * np.log2(side, out=np.zeros_like(r), where=side > 0)
    return out


def dead(counts: ArrayLike) -> Bools:
    """Which leaves have a share under 0.01 / L, [..., L]."""
    p = shares(counts)
    return np.asarray(p < DEAD_SHARE / p.shape[-1])


def dead_frac(counts: ArrayLike) -> Floats:
    """Share of leaves with p < 0.01 / L, [...]; resolved only from N = 1000·L tokens on (see `resolution`)."""
    return _where_counted(dead(counts).mean(-1), counts)


def never_hit(counts: ArrayLike) -> Floats:
    """Share of leaves that no token reached, [...]."""
    return _where_counted((np.asarray(counts) == 0).mean(-1), counts)


def max_vio(counts: ArrayLike) -> Floats:
    """Load of the fullest leaf over the mean load, minus 1: L·max p - 1 [...], 0 to L - 1."""
    p = shares(counts)
    out: Floats = p.shape[-1] * p.max(-1) - 1.0
    return out


def min_vio(counts: ArrayLike) -> Floats:
    """How far the emptiest leaf is under the mean load: 1 - L·min p [...], 0 to 1."""
    p = shares(counts)
    out: Floats = 1.0 - p.shape[-1] * p.min(-1)
    return out


def cv2(counts: ArrayLike) -> Floats:
    """Squared coefficient of variation of the loads: L·Σp² - 1 [...]; see `cv2_floor`."""
    p = shares(counts)
    out: Floats = p.shape[-1] * np.square(p).sum(-1) - 1.0
    return out


def cv2_floor(counts: ArrayLike) -> Floats:
    """(L - 1) / N [...]: the cv2 that N tokens of a perfectly uniform router are expected to show."""
    c = np.asarray(counts, dtype=np.float64)
    n = c.sum(-1)
    out: Floats = np.divide(c.shape[-1] - 1.0, n, out=np.full_like(n, np.nan), where=n > 0)
    return out


def gini(counts: ArrayLike) -> Floats:
    """Gini coefficient Σ (2i - L - 1) p_(i) / L over ascending shares [...]: 0 uniform, 1 - 1/L one leaf."""
    p = np.sort(shares(counts), axis=-1)
    width = p.shape[-1]
    out: Floats = p @ (2.0 * np.arange(1, width + 1) - width - 1.0) / width
    return out


def branch_imbalance(counts: ArrayLike) -> Floats:
    """Per level Σ_n p_n |2 r_n - 1| [..., D]: 0 where every node halves its tokens, 1 where none splits at all."""
    levels = node_counts(counts)
    total = levels[0][..., 0].astype(np.float64)
    out = np.empty((*total.shape, len(levels) - 1))
    for d, level in enumerate(levels[1:]):
        moved = np.abs(level[..., 1::2] - level[..., ::2]).sum(-1)
        out[..., d] = np.divide(moved, total, out=np.full_like(total, np.nan), where=total > 0)
    return out


def flip_rate(leaves_a: ArrayLike, leaves_b: ArrayLike) -> Floats:
    """Share of tokens whose leaf differs between two evaluations of the same tokens; leaves int [..., N] -> [...]."""
    out: Floats = np.not_equal(leaves_a, leaves_b).mean(-1)
    return out


def saturation(leaves_a: ArrayLike, leaves_b: ArrayLike, leaves: int) -> Floats:
    """Agreement of two evaluations beyond chance: κ = (S - c) / (1 - c), c = Σ_l p_l q_l; leaves [..., N] -> [...].

    S is the share of tokens that kept their leaf, `leaves` is L. NaN where both sit on one leaf: it says nothing.
    """
    a, b = np.asarray(leaves_a), np.asarray(leaves_b)
    same = 1.0 - flip_rate(a, b)
    chance = (shares(leaf_counts(a, leaves)) * shares(leaf_counts(b, leaves))).sum(-1)
    room = 1.0 - chance
    out: Floats = np.divide(same - chance, room, out=np.full_like(room, np.nan), where=room > 1e-12)
    return out


def leaf_counts(leaf: ArrayLike, leaves: int) -> Ints:
    """Counts int64 [..., L] of leaf indices [..., N]."""
    index = np.asarray(leaf, dtype=np.int64)
    flat = index.reshape(-1, index.shape[-1])
    offset = np.arange(len(flat))[:, None] * leaves
    counts = np.bincount((flat + offset).ravel(), minlength=len(flat) * leaves)
    return counts.reshape(*index.shape[:-1], leaves)


class Informativeness(NamedTuple):
    """I(leaf; token) / H(leaf) [...], and the same with the tokens shuffled: what chance gives this many tokens."""

    observed: Floats
    shuffled: Floats


def informativeness(leaves: ArrayLike, tokens: ArrayLike, rng: np.random.Generator) -> Informativeness:
    """How much of the routing the token's identity explains; leaf indices [..., N] and token ids [N].

    1 where the token decides the leaf, near the shuffled control where routing is noise; 0 where one leaf takes all.
    """
    index = np.asarray(leaves, dtype=np.int64)
    ids = np.unique(np.asarray(tokens), return_inverse=True)[1].astype(np.int64)
    mixed = rng.permutation(ids)
    flat = index.reshape(-1, index.shape[-1])
    out = np.array([[_explained(row, ids), _explained(row, mixed)] for row in flat])
    observed, shuffled = out.T.reshape(2, *index.shape[:-1])
    return Informativeness(observed, shuffled)


def _explained(leaf: Ints, ids: Ints) -> float:
    """I / H(leaf) by I = H(leaf) + H(token) - H(leaf, token)."""
    joint = leaf * (int(ids.max(initial=0)) + 1) + ids
    h_leaf, h_ids, h_joint = (entropy_nats(np.unique(v, return_counts=True)[1]) for v in (leaf, ids, joint))
    return float((h_leaf + h_ids - h_joint) / h_leaf) if h_leaf > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Deaths:
    """What happened to each leaf between the first and the last of S evaluations; arrays [..., L], steps as indices.

    Imbalance at birth (`never_alive`, dead at the start), transient collapse (`died` and alive again) and self-pruning
    (`pruned`) are separated.
    """

    alive_at_start: Bools
    alive_at_end: Bools
    died: Bools
    """Alive at the start, dead at some later evaluation."""
    pruned: Bools
    """Alive at the start, died, and dead from `dead_since` to the end."""
    never_alive: Bools
    """Dead at every evaluation."""
    first_death: Ints
    """First evaluation at which a leaf alive before was dead; -1 where there was none."""
    dead_since: Ints
    """Evaluation from which a leaf is dead up to the end; -1 where it is alive at the end."""
    deaths: Ints
    """Changes from alive to dead."""
    revivals: Ints
    """Changes from dead to alive."""

    def shares(self) -> dict[str, Floats]:
        """Per tree [...]: share of leaves born dead, pruned, transiently dead, never alive; revivals a leaf."""
        return {
            "born_dead": 1.0 - self.alive_at_start.mean(-1),
            "pruned": self.pruned.mean(-1),
            "transient": (self.died & self.alive_at_end).mean(-1),
            "never_alive": self.never_alive.mean(-1),
            "revivals": self.revivals.mean(-1),
        }


def deaths(counts: ArrayLike) -> Deaths:
    """Death and revival events from counts over evaluations [S, ..., L], S >= 1, the first at step 0."""
    c = np.asarray(counts)
    if c.ndim < 2 or c.shape[0] == 0:
        raise ValueError(f"counts have shape {c.shape}: [steps, ..., leaves] with at least one step is expected")
    gone = dead(c)
    steps = len(gone)
    falls, rises = gone[1:] & ~gone[:-1], ~gone[1:] & gone[:-1]
    first = np.where(falls.any(0), falls.argmax(0) + 1, -1) if steps > 1 else np.full(gone.shape[1:], -1)
    # Index after the last evaluation at which the leaf was alive.
    last_alive = np.where((~gone).any(0), steps - 1 - (~gone)[::-1].argmax(0), -1)
    return Deaths(
        alive_at_start=~gone[0],
        alive_at_end=~gone[-1],
        died=~gone[0] & gone.any(0),
        pruned=~gone[0] & gone[-1],
        never_alive=np.asarray(gone.all(0)),
        first_death=first.astype(np.int64),
        dead_since=np.where(gone[-1], last_alive + 1, -1).astype(np.int64),
        deaths=falls.sum(0, dtype=np.int64),
        revivals=rises.sum(0, dtype=np.int64),
    )


def gradient_skew(right_sum: ArrayLike, right_count: ArrayLike, left_sum: ArrayLike, left_count: ArrayLike) -> Floats:
    """(g⁺ - g⁻) / (g⁺ + g⁻) per node, g± the mean over tokens routed right / left of |∂l/∂z_n|·‖x‖; broadcasts.

    NaN where a side has fewer than 30 tokens, or where no gradient flows at all. Means, since sums grow with traffic.
    """
    rc, lc = np.asarray(right_count, dtype=np.float64), np.asarray(left_count, dtype=np.float64)
    g_right, g_left = np.asarray(right_sum) / np.maximum(rc, 1.0), np.asarray(left_sum) / np.maximum(lc, 1.0)
    total = np.asarray(g_right + g_left, dtype=np.float64)
    known = (rc >= MIN_SIDE) & (lc >= MIN_SIDE) & (total > 0)
    out: Floats = np.divide(g_right - g_left, total, out=np.full(total.shape, np.nan), where=known)
    return out


def collapse(lost: ArrayLike) -> Bools:
    """Whether any layer's bits_lost, mean over its trees, is above 0.5; bits lost [..., layers, K] -> [...]."""
    return np.asarray((np.asarray(lost, dtype=np.float64).mean(-1) > COLLAPSE_BITS).any(-1))


def ceiling(responses: ArrayLike) -> float:
    """N_eff / L that this data allows one tree, from all node responses z [N, M] in heap order; see `ceiling_by`."""
    z = np.asarray(responses, dtype=np.float64)
    if z.ndim != 2:
        raise ValueError(f"responses have shape {z.shape}: [N, M] is expected")
    tokens = np.arange(len(z))
    return ceiling_by(lambda nodes: z[tokens, nodes], len(z), depth_of(z.shape[1] + 1))


def ceiling_by(response: Callable[[Ints], Floats], tokens: int, depth: int) -> float:
    """N_eff / L after thresholds are reset to medians on half the tokens, measured on the other half.

    `response` takes one node [N] (heap index) for each token and gives its z [N]. From the root down, each threshold
    is put where it halves those of the first N // 2 tokens that reach the node; the rest are routed by it. Tokens
    should be in the order of the text, so that the halves are different documents. A very frequent token cannot be
    split, which is what keeps this under 1. Raises ValueError for fewer than 2 tokens.
    """
    if tokens < 2:
        raise ValueError(f"{tokens} tokens: at least 2 are needed, one for each half")
    half = tokens // 2
    at = np.zeros(tokens, dtype=np.int64)
    for level in range(depth):
        first = (1 << level) - 1
        z = np.asarray(response(at), dtype=np.float64)
        thresholds = _halving_thresholds(at[:half] - first, z[:half], 1 << level)
        at = 2 * at + 1 + (z > thresholds[at - first])
    leaves = 1 << depth
    return float(n_eff_frac(leaf_counts(at[half:] - (leaves - 1), leaves)))


def _halving_thresholds(group: Ints, z: Floats, groups: int) -> Floats:
    """For each group the t above which half its values lie, as nearly as equal values allow; 0 where empty."""
    order = np.lexsort((z, group))
    group, z = group[order], z[order]
    thresholds = np.zeros(groups)
    if not len(z):
        return thresholds
    new_run = np.concatenate([[True], (np.diff(z) != 0) | (np.diff(group) != 0)])
    run_start = np.flatnonzero(new_run)
    run_end = np.concatenate([run_start[1:], [len(z)]])
    sizes = np.bincount(group, minlength=groups)
    starts = np.cumsum(sizes) - sizes
    used = np.flatnonzero(sizes)
    start, end = starts[used], starts[used] + sizes[used]
    # The run of equal values in the middle goes to the side that leaves the halves nearer to each other.
    run = (np.cumsum(new_run) - 1)[start + (sizes[used] - 1) // 2]
    below, above = run_start[run], run_end[run]
    cut = np.where(np.abs(2 * above - start - end) <= np.abs(2 * below - start - end), above, below)
    under, over = z[np.maximum(cut - 1, start)], z[np.minimum(cut, end - 1)]
    middle = under + (over - under) / 2
    # Where all values are equal the cut is at an end: a threshold at the value keeps them left, one under it right.
    thresholds[used] = np.where(cut == start, np.nextafter(under, -np.inf), np.where(middle < over, middle, under))
    return thresholds


class Resolution(NamedTuple):
    """Whether there were tokens enough to tell, [...]; `never_hit` needs no such number."""

    n_eff: Bools
    """N >= 64·L."""
    dead: Bools
    """N >= 1000·L; below it dead_frac is unresolved."""


def resolution(counts: ArrayLike) -> Resolution:
    """Which metrics the number of tokens counted can resolve; counts [..., L] -> flags [...]."""
    c = np.asarray(counts)
    n = c.sum(-1)
    return Resolution(n >= 64 * c.shape[-1], n >= 1000 * c.shape[-1])


def _branch_mean(counts: ArrayLike) -> Floats:
    b = branch_imbalance(counts)
    return b.mean(-1) if b.shape[-1] else np.zeros(b.shape[:-1])


# Each metric of `summary`, with the function that picks the worst tree.
SUMMARY: dict[str, tuple[Any, Any]] = {
    "n_eff_frac": (n_eff_frac, np.min),
    "dead_frac": (dead_frac, np.max),
    "never_hit": (never_hit, np.max),
    "max_vio": (max_vio, np.max),
    "gini": (gini, np.max),
    "bits_lost": (bits_lost, np.max),
    "branch_imbalance": (_branch_mean, np.max),
}
# What `summary` gives beside them, as 0 or 1.
FLAGS = ("collapse", "n_eff_resolved", "dead_resolved")


def summary(counts: ArrayLike) -> dict[str, float]:
    """One evaluation's counts [layers, K, L] as named numbers.

    `name` is the mean over trees and layers, `name_worst` the worst single tree, `layer{i}/name` a layer's mean over
    its trees. `collapse`, `n_eff_resolved` and `dead_resolved` (were there tokens enough in every tree) are 0 or 1.
    """
    c = np.asarray(counts)
    if c.ndim != 3:
        raise ValueError(f"counts have shape {c.shape}: [layers, trees, leaves] is expected")
    out: dict[str, float] = {}
    for name, (metric, worst) in SUMMARY.items():
        per_tree = metric(c)
        out[name] = float(per_tree.mean())
        out[f"{name}_worst"] = float(worst(per_tree))
        out |= {f"layer{i}/{name}": float(v) for i, v in enumerate(per_tree.mean(-1))}
    enough = resolution(c)
    out["collapse"] = float(collapse(bits_lost(c)))
    out["n_eff_resolved"] = float(enough.n_eff.all())
    out["dead_resolved"] = float(enough.dead.all())
    return out


def _where_counted(values: Any, counts: ArrayLike) -> Floats:
    return np.where(np.asarray(counts).sum(-1) > 0, values, np.nan)
