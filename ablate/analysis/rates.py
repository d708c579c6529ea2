"""Learning rates in findings.json: what tuning showed, which rates each comparison rests on, and what it may not claim."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl

from ablate.analysis import contrasts
from ablate.analysis.frames import Tables
from ablate.analysis.verdicts import sentence
from ablate.config import Bracket
from ablate.config.endpoints import ENDPOINTS, Endpoint
from ablate.results.rates import rate_table

RULES = {
    "none": "one learning rate for all arms",
    "grid": "each arm at the best of a fixed list of learning rates",
    "bracket": "each arm at its own best learning rate",
    "searched": "the learning rate is a dimension of the search",
}


def rule_of(tables: Tables) -> str:
    """Return how the arms of a study got their learning rates: a key of RULES."""
    study = tables.study
    if "train.lr" in study.factors and study.design == "search":
        return "searched"
    if study.tune is None:
        return "none"
    return "bracket" if isinstance(study.tune, Bracket) else "grid"


def learning_rates(tables: Tables) -> list[dict[str, Any]]:
    """Per arm with tuning runs: quality and balance at each rate, the best one, whether it is an optimum, best of n."""
    quality = tables.study.quality
    q = quality.name
    ids = tables.trials.filter(pl.col("kind") == "tune").group_by("arm").agg(pl.col("run_id"))
    runs = dict(ids.iter_rows())
    out = []
    table = rate_table(tables.trials, tables.plan)
    for (arm,), group in table.partition_by("arm", as_dict=True, maintain_order=True).items():
        measured = [name for name in ENDPOINTS if name != q and group[name].count()]
        rates = [
            {"lr": r["lr"], q: r[q], "n": r["trials"], "diverged": r["diverged"]} | {name: r[name] for name in measured}
            for r in group.iter_rows(named=True)
        ]
        known = [r for r in rates if r[q] is not None]
        best = min(known, key=lambda r: quality.sign * r[q])["lr"] if known else None
        chosen = group.filter(pl.col("chosen"))
        out.append(
            {
                "arm": arm,
                "rates": rates,
                "rounds": group["round"].to_list() if chosen.height else None,
                "best": best,
                "chosen": chosen["lr"][0] if chosen.height else best,
                "interior": rates[0]["lr"] < best < rates[-1]["lr"] if known else None,
                "best_of_n": best_of(np.array([r[q] for r in known]), quality) if known else [],
                "run_ids": runs[arm] if known else [],
            }
        )
    return sorted(out, key=lambda r: str(r["arm"]))


def best_of(values: Any, quality: Endpoint) -> list[float]:
    """Expected best of n of these values drawn without replacement, n = 1..N (the unbiased estimator of
    2110.00613).
    """
    ordered = quality.sign * np.sort(quality.sign * np.asarray(values, dtype=float))
    total = len(ordered)
    return [
        float(sum(v * math.comb(total - i - 1, n - 1) for i, v in enumerate(ordered)) / math.comb(total, n))
        for n in range(1, total + 1)
    ]


def bounds(known: list[dict[str, Any]]) -> set[str]:
    """Return the arms whose rate is the smallest or largest tried, from `learning_rates`: a bound, not an optimum."""
    return {r["arm"] for r in known if r["interior"] is not True}


def name_rates(tables: Tables, found: list[dict[str, Any]], known: list[dict[str, Any]]) -> None:
    """Add to each finding the rates it rests on, and what the tuning seeds show at other rates.

    A claim that two arms match cannot be supported where the rate of either is a bound: a better rate might part them.
    """
    rule, by_arm, bound = rule_of(tables), {r["arm"]: r for r in known}, bounds(known)
    values = _Tuning(tables)
    own = dict(tables.evaluation().group_by("arm").agg(pl.col("lr").mean()).iter_rows())
    for f in found:
        if f["kind"] != "contrast":
            f["rates"] = {"rule": rule}
            continue
        pair = f["arm"], f["reference"]
        capped = [f[f"{side}_label"] for side, arm in zip(("arm", "reference"), pair, strict=True) if arm in bound]
        f["rates"] = {"rule": rule, "arm": own.get(pair[0]), "reference": own.get(pair[1]), "bound": capped}
        if all(arm in by_arm and by_arm[arm]["chosen"] is not None for arm in pair):
            f["rates"]["elsewhere"] = values.elsewhere(by_arm[pair[0]], by_arm[pair[1]], f["endpoint"])
        if capped and f["claim"] == "matches" and f["verdict"] == "supported":
            f["verdict"] = "inconclusive"
            f["reasons"].append(f"learning rate of {' and '.join(capped)}: a bound, not an optimum")
            f["text"] = sentence(f)


def withhold_restored(records: list[dict[str, Any]], reference: str | None, known: list[dict[str, Any]]) -> None:
    """Leave open whether balance is restored at no cost where the rate of the arm or of the reference is a bound."""
    bound = bounds(known)
    for r in records:
        if r["arm"] == reference or not {r["arm"], reference} & bound:
            continue
        r["rate_is_bound"] = True
        r["restored"] = None if r["restored"] else r["restored"]
        r["at_threshold"] = {t: None if held else held for t, held in r["at_threshold"].items()}


class _Tuning:
    """Endpoints of tuning runs by arm, rate and seed."""

    def __init__(self, tables: Tables) -> None:
        rows = tables.trials.filter((pl.col("kind") == "tune") & (pl.col("status") == "finished"))
        self._rows = {(r["arm"], r["lr"], r["seed"]): r for r in rows.iter_rows(named=True)}
        self._seeds = sorted({seed for _, _, seed in self._rows})

    def elsewhere(self, arm: dict[str, Any], reference: dict[str, Any], endpoint: str) -> list[dict[str, Any]]:
        """Return the difference at a shared rate and at both neighbours of the chosen rates, where both were tried.

        The shared rate is the one nearest to the reference's that both have tried.
        """
        mine, theirs = [r["lr"] for r in arm["rates"]], [r["lr"] for r in reference["rates"]]
        both = sorted(set(mine) & set(theirs), key=lambda lr: abs(math.log(lr / reference["chosen"])))
        pairs = {"shared": (both[0], both[0])} if both else {}
        at, other = mine.index(arm["chosen"]), theirs.index(reference["chosen"])
        if at and other:
            pairs["below"] = mine[at - 1], theirs[other - 1]
        if at + 1 < len(mine) and other + 1 < len(theirs):
            pairs["above"] = mine[at + 1], theirs[other + 1]
        found = ((name, pair, self._difference(arm, reference, pair, endpoint)) for name, pair in pairs.items())
        return [{"at": name, "arm": a, "reference": b} | d for name, (a, b), d in found if d]

    def _difference(
        self, arm: dict[str, Any], reference: dict[str, Any], rates: tuple[float, float], endpoint: str
    ) -> dict[str, Any] | None:
        differences = []
        for seed in self._seeds:
            a = self._rows.get((arm["arm"], rates[0], seed), {}).get(endpoint)
            b = self._rows.get((reference["arm"], rates[1], seed), {}).get(endpoint)
            if a is not None and b is not None:
                differences.append(a - b)
        if not differences:
            return None
        if len(differences) == 1:
            return {"effect": differences[0], "interval": None, "n": 1}
        e = contrasts.paired(differences)
        return {"effect": float(e.effect), "interval": [float(e.low), float(e.high)], "n": len(differences)}
