"""Balance against quality: which arms no other beats on both, and how sure that is over seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablate.analysis.contrasts import Array


def front(cost: Array, gain: Array) -> NDArray[np.bool_]:
    """Arms that no other beats: none has at most the cost and at least the gain with one of them better; [..., m]."""
    order = np.lexsort((-gain, cost), axis=-1)
    sorted_cost = np.take_along_axis(cost, order, -1)
    sorted_gain = np.take_along_axis(gain, order, -1)
    best = np.maximum.accumulate(sorted_gain, axis=-1)
    before = np.concatenate([np.full((*best.shape[:-1], 1), -np.inf), best[..., :-1]], axis=-1)
    kept = sorted_gain > before
    # An equal pair beats nobody: where both coordinates repeat the arm before, it shares that arm's fate.
    for i in range(1, cost.shape[-1]):
        twin = (sorted_cost[..., i] == sorted_cost[..., i - 1]) & (sorted_gain[..., i] == sorted_gain[..., i - 1])
        kept[..., i] |= twin & kept[..., i - 1]
    out = np.zeros_like(kept)
    np.put_along_axis(out, order, kept, axis=-1)
    return out


def hypervolume(cost: Array, gain: Array, reference: tuple[float, float]) -> Array:
    """Area that the arms [..., m] dominate over a fixed reference point (cost, gain), the worst corner."""
    order = np.argsort(cost, axis=-1, kind="stable")
    c = np.minimum(np.take_along_axis(cost, order, -1), reference[0])
    g = np.maximum(np.take_along_axis(gain, order, -1), reference[1])
    best = np.maximum.accumulate(g, axis=-1)
    edge = np.concatenate([c[..., 1:], np.full((*c.shape[:-1], 1), reference[0])], axis=-1)
    return np.asarray(((edge - c) * (best - reference[1])).sum(-1))


def over_seeds(
    cost: list[Array], gain: list[Array], reference: tuple[float, float], rng: np.random.Generator, draws: int = 1000
) -> dict[str, Any]:
    """Front of the arms' means, bootstrap probability of being on it, hypervolume and its interval.

    One array of seeds an arm (cost and gain of the same runs); arms with equally many seeds are resampled together,
    as their
    seeds share data order and initialisation.
    """
    mean_cost = np.array([c.mean() for c in cost])
    mean_gain = np.array([g.mean() for g in gain])
    sizes = sorted({len(c) for c in cost})
    picks = {n: rng.integers(n, size=(draws, n)) for n in sizes}
    drawn_cost = np.empty((draws, len(cost)))
    drawn_gain = np.empty((draws, len(cost)))
    for i, (c, g) in enumerate(zip(cost, gain, strict=True)):
        drawn_cost[:, i] = c[picks[len(c)]].mean(-1)
        drawn_gain[:, i] = g[picks[len(g)]].mean(-1)
    volumes = hypervolume(drawn_cost, drawn_gain, reference)
    return {
        "front": front(mean_cost, mean_gain).tolist(),
        "probability": front(drawn_cost, drawn_gain).mean(0).tolist(),
        "hypervolume": float(hypervolume(mean_cost, mean_gain, reference)),
        "interval": np.quantile(volumes, [0.025, 0.975]).tolist(),
    }
