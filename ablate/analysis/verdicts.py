"""Families of comparisons turned into findings: what was claimed, what was measured, and one of three verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from ablate.analysis import contrasts, power
from ablate.analysis.contrasts import Claim, Estimate
from ablate.config.endpoints import unit_of
from ablate.results.columns import QA

# Collapsed and other runs are two modes where Ashman's D is over 2 and no run lies within the gap, in bits_lost. The
# gap
# keeps a threshold that happens to cut one continuous cloud of few seeds from counting as two.
MODES = 2.0
GAP = 0.15


@dataclass(frozen=True)
class Comparison:
    """One planned comparison: `claim` says how `arm` compares with `reference` on `endpoint`."""

    arm: str
    reference: str
    endpoint: str
    claim: Claim
    margin: float
    blocked: str = ""
    """Why this task cannot decide it (no assay sensitivity); the verdict is then inconclusive."""


@dataclass(frozen=True)
class Runs:
    """Outcomes by arm and seed."""

    values: dict[tuple[str, str], dict[int, float]]
    """(arm, endpoint) to seed to value, in order of seed."""
    run_ids: dict[tuple[str, int], str]
    collapsed: dict[str, dict[int, bool]]
    bits_lost: dict[str, dict[int, float]]

    @classmethod
    def of(cls, frame: pl.DataFrame, endpoints: list[str]) -> Runs:
        """Group a frame of outcomes (columns arm, seed, run_id, collapse, bits_lost and the endpoints)."""
        values: dict[tuple[str, str], dict[int, float]] = {}
        run_ids: dict[tuple[str, int], str] = {}
        collapsed: dict[str, dict[int, bool]] = {}
        lost: dict[str, dict[int, float]] = {}
        for row in frame.sort("arm", "seed").iter_rows(named=True):
            arm, seed = row["arm"], row["seed"]
            run_ids[arm, seed] = row["run_id"]
            for endpoint in endpoints:
                if row[endpoint] is not None:
                    values.setdefault((arm, endpoint), {})[seed] = row[endpoint]
            if row["collapse"] is not None and row["bits_lost"] is not None:
                collapsed.setdefault(arm, {})[seed] = row["collapse"] >= 0.5
                lost.setdefault(arm, {})[seed] = row["bits_lost"]
        return cls(values, run_ids, collapsed, lost)

    def modes(self, arm: str) -> str:
        """Why the runs of an arm must not be averaged, or nothing: some collapsed, others not, and clearly apart."""
        flags = self.collapsed.get(arm, {})
        hit = sum(flags.values())
        if not 0 < hit < len(flags):
            return ""
        values, which = np.array(list(self.bits_lost[arm].values())), np.array(list(flags.values()))
        if not two_modes(values, which):
            return ""
        return f"{hit} of {len(flags)} runs of {arm} collapsed, the others did not: no average"


def two_modes(bits_lost: Any, collapsed: Any) -> Any:
    """Whether collapsed and other runs [..., n] are two clearly separate groups [...]; False where only one occurs."""
    x, c = np.asarray(bits_lost, dtype=float), np.asarray(collapsed, dtype=bool)
    gap = np.where(c, x, np.inf).min(-1) - np.where(c, -np.inf, x).max(-1)
    both = c.any(-1) & ~c.all(-1)
    return both & (gap >= GAP) & (power.separation(x, c) > MODES)


def findings(
    comparisons: list[Comparison],
    runs: Runs,
    labels: dict[str, str],
    *,
    family: str,
    method: Literal["holm", "bh"],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Judge one family of comparisons; one record each, in order (docs/findings.md describes its fields).

    Paired where both arms share at least two seeds, else Welch; a comparison that cannot be tested keeps its place in
    the
    family with p = 1, so that a failure never makes the others easier to pass.
    """
    m = len(comparisons)
    columns = {f: np.full(m, np.nan) for f in ("effect", "se", "df", "low", "high", "p", "sd", "flip", "detectable")}
    paired = np.zeros(m, dtype=bool)
    samples: dict[tuple[bool, int, int], list[tuple[int, list[float], list[float]]]] = {}
    used: list[tuple[list[int], list[int]]] = []
    reasons: list[list[str]] = []
    for i, c in enumerate(comparisons):
        a, b = runs.values.get((c.arm, c.endpoint), {}), runs.values.get((c.reference, c.endpoint), {})
        shared = sorted(a.keys() & b.keys())
        reasons.append([text for text in (c.blocked, runs.modes(c.arm), runs.modes(c.reference)) if text])
        both = len(shared) >= 2
        used.append((shared, shared) if both else (sorted(a), sorted(b)))
        paired[i] = both
        if not both and min(len(a), len(b)) < 2:
            reasons[i].append(f"{len(a)} and {len(b)} runs: an interval needs two a side")
        elif runs.modes(c.arm) or runs.modes(c.reference):
            pass
        elif both:
            samples.setdefault((True, len(shared), 0), []).append((i, [a[s] - b[s] for s in shared], []))
        else:
            samples.setdefault((False, len(a), len(b)), []).append((i, list(a.values()), list(b.values())))
    for (both, n, k), group in samples.items():
        where = [i for i, _, _ in group]
        x = np.array([values for _, values, _ in group])
        e = contrasts.paired(x) if both else contrasts.welch(x, np.array([values for _, _, values in group]))
        for field in ("effect", "se", "df", "low", "high", "p", "sd"):
            columns[field][where] = getattr(e, field)
        columns["detectable"][where] = power.detectable(n if both else min(n, k), paired=both) * e.sd
        if both:
            columns["flip"][where] = contrasts.sign_flip(x, rng)
    tested = ~np.isnan(columns["effect"])
    # Untested places: no effect seen with an endless spread gives p = 1 to every test.
    e = Estimate(
        effect=np.where(tested, columns["effect"], 0.0),
        se=np.where(tested, columns["se"], np.inf),
        df=np.where(tested, columns["df"], 1.0),
        low=columns["low"],
        high=columns["high"],
        p=np.where(tested, columns["p"], 1.0),
        sd=columns["sd"],
    )
    judged = contrasts.judge(e, np.array([c.margin for c in comparisons]), [c.claim for c in comparisons], method)
    out = []
    for i, c in enumerate(comparisons):
        decided = tested[i] and not reasons[i]
        verdict = (
            "supported"
            if decided and judged.supported[i]
            else "refuted"
            if decided and judged.refuted[i]
            else "inconclusive"
        )
        seeds, other = used[i]
        ids = [runs.run_ids[c.arm, s] for s in seeds] + [runs.run_ids[c.reference, s] for s in other]
        below = bool(decided and judged.below_margin[i])
        record = {
            "id": f"{family}/{c.arm}/{c.reference}/{c.endpoint}",
            "family": family,
            "family_size": m,
            "adjustment": method,
            "kind": "contrast",
            "arm": c.arm,
            "arm_label": labels.get(c.arm, c.arm),
            "reference": c.reference,
            "reference_label": labels.get(c.reference, c.reference),
            "endpoint": c.endpoint,
            "unit": "score" if c.endpoint.startswith(QA) else unit_of(c.endpoint),
            "claim": c.claim,
            "margin": c.margin,
            "verdict": verdict,
            "below_margin": below,
            "reasons": reasons[i],
            "effect": _value(columns["effect"][i]),
            "interval": [_value(columns["low"][i]), _value(columns["high"][i])] if tested[i] else None,
            "sd": _value(columns["sd"][i]),
            "p": _value(judged.p[i]) if tested[i] else None,
            "p_adjusted": _value(judged.p_adjusted[i]) if tested[i] else None,
            "p_sign_flip": _value(columns["flip"][i]),
            "p_within_margin": _value(judged.p_within[i]) if tested[i] else None,
            "detectable": _value(columns["detectable"][i]),
            "n": len(seeds) if paired[i] else min(len(seeds), len(other)),
            "paired": bool(paired[i]),
            "seeds": sorted(set(seeds) | set(other)),
            "run_ids": ids,
        }
        record["text"] = sentence(record)
        out.append(record)
    return out


def _value(x: float) -> float | None:
    return None if np.isnan(x) else float(x)


def sentence(f: dict[str, Any]) -> str:
    """A finding in one plain sentence."""
    name, other = f["arm_label"], f["reference_label"]
    claim = {
        "lower": f"{f['endpoint']} of {name} is lower than of {other}",
        "higher": f"{f['endpoint']} of {name} is higher than of {other}",
        "matches": f"{f['endpoint']} of {name} is within {f['margin']:g} of {other}",
        "differs": f"{f['endpoint']} of {name} differs from {other}",
    }[f["claim"]]
    if f["effect"] is None:
        return f"{claim}: {f['verdict']}."
    low, high = f["interval"]
    extra = ", real but within the margin" if f["below_margin"] else ""
    return f"{claim}: {f['verdict']}{extra} ({f['effect']:+.4g}, 95% interval {low:+.4g} to {high:+.4g}, n {f['n']})."
