"""How much a difference in bits per byte rests on the held-out text: an interval over its windows.

Intervals over seeds say what other seeds would show on the same text. Here the arms are as they are, and the text is the
sample: windows are drawn evenly over the held-out split, and are the unit. The difference is a ratio of sums, so its error
is that of a ratio.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import scipy.stats

from ablate.analysis.frames import Tables
from ablate.config.endpoints import BPB


def half_width(bits: np.ndarray, lengths: np.ndarray, level: float = 0.95) -> float | None:
    """Return half of the interval of sum(bits) / sum(lengths) over windows; None for fewer than two.

    Args:
        bits: bits of one arm minus those of another on each window, or bits of one arm.
        lengths: bytes of each window.
        level: of the interval.
    """
    n = len(bits)
    if n < 2:
        return None
    rest = bits - bits.sum() / lengths.sum() * lengths
    error = np.sqrt(n / (n - 1) * np.sum(rest**2)) / lengths.sum()
    return float(scipy.stats.t.isf((1 - level) / 2, n - 1) * error)


def name_text(tables: Tables, found: list[dict[str, Any]]) -> None:
    """Add to each comparison of bits per byte its interval over the held-out text, where the trials kept its windows."""
    if tables.windows is None:
        return
    kept = tables.windows.filter(pl.col("kind") != "finalist").sort("window")
    arms = {key[0]: part for key, part in kept.partition_by("arm", as_dict=True).items()}
    for f in found:
        if f["kind"] != "contrast" or f["endpoint"] != BPB.name or f["effect"] is None:
            continue
        a, b = arms.get(f["arm"]), arms.get(f["reference"])
        if a is None or b is None or a["window"].to_list() != b["window"].to_list():
            continue
        half = half_width(a["bits"].to_numpy() - b["bits"].to_numpy(), a["bytes"].to_numpy())
        if half is not None:
            f["over_text"] = {"interval": [f["effect"] - half, f["effect"] + half], "windows": a.height}
