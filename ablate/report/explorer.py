"""Data of the page's explorer of runs."""

from __future__ import annotations

import json
from typing import Any

from ablate.analysis.arms import level_text
from ablate.report.context import Context

EXPLORED = 5000  # runs that the page's explorer holds


def explorer(c: Context, rows: list[dict[str, Any]], factors: list[str]) -> dict[str, Any]:
    """Return runs by column for the page's explorer, with the settings that differ between any two of them."""
    kept = rows[:EXPLORED]
    settings = _varying(c.tables.trials["config"].to_list()[:EXPLORED])
    columns = ["trial", "arm", "kind", "seed", "status", c.quality.name, "n_eff_frac", "dead_frac"]
    return {
        "columns": {k: [r[k] for r in kept] for k in columns},
        "runs": [r["runs"][0] for r in kept],
        "settings": settings,
        "address": c.address or "",
        "total": len(rows),
        "factors": factors,
    }


def _varying(configs: list[str | None]) -> dict[str, list[str]]:
    """Return flattened settings whose value differs between trials, as text."""
    flat = [_flatten(json.loads(t)) if t else {} for t in configs]
    keys = sorted({k for f in flat for k in f})
    out = {}
    for k in keys:
        values = [level_text(f.get(k)) for f in flat]
        if len(set(values)) > 1:
            out[k] = values
    return out


def _flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data if isinstance(data, (bool, int, float, str)) or data is None else str(data)}
    out: dict[str, Any] = {}
    for k, v in data.items():
        out |= _flatten(v, f"{prefix}.{k}" if prefix else str(k))
    return out
