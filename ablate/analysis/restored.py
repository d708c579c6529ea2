"""Is balance restored? Decided on bits lost, which compares across depths, with an interval for each criterion."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.analysis import contrasts, tails
from ablate.analysis.arms import DEAD_TARGET
from ablate.analysis.contrasts import ALPHA
from ablate.analysis.frames import Tables
from ablate.analysis.verdicts import Comparison, Runs, late_runs
from ablate.config.endpoints import BITS_LOST, RESTORED, equivalent, most_lost

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def restored(tables: Tables, runs: Runs, frame: pl.DataFrame, reference: str | None) -> list[dict[str, Any]]:
    """Return, per arm, whether balance is restored, criterion by criterion, and how the answer depends on the threshold.

    Every criterion is met where its whole 95% interval is: bits lost at most what RESTORED effective leaves lose at depth
    DEPTH; dead leaves at most 1% (unresolved where there were too few tokens); quality no worse than the reference arm's
    by the margin. Informativeness counts where it was measured. The tests of quality are one family over the arms that
    meet the other criteria (Bonferroni): no other arm could earn the word.
    """
    rows = frame.filter(pl.col("n_eff_frac").is_not_null() & pl.col(BITS_LOST.name).is_not_null())
    groups = {str(k[0]): g for k, g in rows.partition_by("arm", as_dict=True, maintain_order=True).items()}
    balances = {arm: _balance(group) for arm, group in groups.items()}
    able = [arm for arm, b in balances.items() if arm != reference and b["balanced"] is not False]
    out = []
    for arm, group in sorted(groups.items()):
        size = len(able) if arm in able else max(1, len(able))
        quality = _quality(tables, runs, arm, reference, size)
        record = {"arm": arm} | balances[arm] | quality
        q = record[f"{tables.study.quality.name}_ok"]
        out.append(
            record
            | {
                "at_threshold": {
                    f"{t:g}": _all([_under(record["bits_lost_bound"], most_lost(t)), *_rest(record), q])
                    for t in THRESHOLDS
                },
                "restored": _all([record["balanced"], q]),
                "n": group.height,
                "run_ids": group["run_id"].to_list(),
            }
        )
    return out


def _balance(rows: pl.DataFrame) -> dict[str, Any]:
    """Return the criteria on balance of one arm's runs."""
    lost = rows[BITS_LOST.name].to_numpy()
    bound = _bound(lost)
    dead = rows["dead_frac"].drop_nulls().to_numpy()
    dead_bound = _bound(dead)
    resolved = rows["dead_resolved"].drop_nulls().to_numpy()
    dead_ok = _under(dead_bound, DEAD_TARGET)
    if len(resolved) and resolved.min() < 1:
        dead_ok = None
    pair = rows["informativeness"].to_numpy(), rows["informativeness_shuffled"].to_numpy()
    informative = bool(np.nanmean(pair[0]) > np.nanmean(pair[1])) if rows["informativeness"].count() else None
    record = {
        "bits_lost": float(lost.mean()),
        "bits_lost_bound": bound,
        "n_eff_frac": float(rows["n_eff_frac"].to_numpy().mean()),
        "n_eff_frac_worst": float(np.min(rows["n_eff_frac_worst"].drop_nulls().to_numpy(), initial=1.0)),
        "n_eff_6": equivalent(float(lost.mean())),
        "n_eff_6_bound": None if bound is None else equivalent(bound),
        "dead_bound": dead_bound,
        "dead_ok": dead_ok,
        "informative": informative,
    }
    return record | {"balanced": _all([_under(bound, most_lost(RESTORED)), *_rest(record)])}


def _rest(record: dict[str, Any]) -> list[bool | None]:
    """Return the criteria on balance beside bits lost."""
    return [record["dead_ok"]] + ([record["informative"]] if record["informative"] is not None else [])


def _quality(tables: Tables, runs: Runs, arm: str, reference: str | None, size: int) -> dict[str, Any]:
    """Return whether an arm's quality is no worse than the reference's by the margin, as one of `size` tests."""
    q, margin = tables.study.quality, tables.study.margin
    a, b = runs.values.get((arm, q.name), {}), runs.values.get((reference or "", q.name), {})
    shared = sorted(a.keys() & b.keys())
    empty: dict[str, Any] = {f"{q.name}_bound": None, f"{q.name}_p": None, "late_cost": None, "family_size": size}
    if arm == reference or len(shared) < 2:
        return empty | {f"{q.name}_ok": True if arm == reference else None}
    n, c = len(shared), Comparison(arm, reference or "", q.name, "matches", margin)
    late, _ = late_runs(c, a, b, shared)
    share = [sum(of == name for of, _ in late) / n for name in (arm, reference)]
    cost = float(tails.late_cost(q.name, share[0], n, share[1], n))
    bound, p = tails.no_worse(
        [q.sign * (a[s] - b[s]) for s in shared],
        margin,
        tail=tails.heavy(q.name) is not None,
        cost=cost,
        level=1 - ALPHA / size,
    )
    adjusted = min(1.0, float(p) * size)
    return empty | {
        f"{q.name}_bound": float(bound),
        f"{q.name}_p": adjusted,
        "late_cost": cost,
        f"{q.name}_ok": adjusted < ALPHA,
    }


def _bound(values: Any) -> float | None:
    """Return the upper end of the mean's 95% t interval; None under two runs."""
    return float(contrasts.paired(values).high) if len(values) > 1 else None


def _under(bound: float | None, most: float) -> bool | None:
    return None if bound is None else bool(bound <= most)


def _all(met: list[bool | None]) -> bool | None:
    """Return whether all are met; None where one is unknown and none is missed."""
    return False if False in met else None if None in met else True
