"""Families of comparisons turned into findings: what was claimed, what was measured, and one of three verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from ablate.analysis import contrasts, power, tails
from ablate.analysis.contrasts import Claim
from ablate.config.endpoints import ENDPOINTS, unit_of
from ablate.results.columns import QA

# Collapsed and other runs are two modes where Ashman's D is over 2 and no run lies within the gap, in bits_lost. The
# gap keeps a threshold that happens to cut one continuous cloud of few seeds from counting as two.
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
    same_runs: bool = False,
) -> list[dict[str, Any]]:
    """Judge one family of comparisons; one record each, in order (docs/findings.md describes its fields).

    Paired where both arms share at least two seeds, else Welch; a comparison that cannot be tested keeps its place in
    the family with p = 1, so that a failure never makes the others easier to pass. With `same_runs` both sides are the
    same trained runs, so that none of them learnt later than its partner.
    """
    if not comparisons:
        return []
    m = len(comparisons)
    columns = {f: np.full(m, np.nan) for f in ("effect", "low", "high", "sd", "p", "within", "beyond", "flip")}
    detectable = np.full(m, np.nan)
    taken = [_taken(c, runs, same_runs=same_runs) for c in comparisons]
    for key in dict.fromkeys(t.group for t in taken if t.group):
        where = [i for i, t in enumerate(taken) if t.group == key]
        both, tail, n, k = key
        margin = np.array([comparisons[i].margin for i in where])
        x = np.array([taken[i].values for i in where])
        if both:
            e = tails.locate(x, margin, tail=tail, cost=np.array([taken[i].cost for i in where]))
            columns["flip"][where] = contrasts.sign_flip(x, rng)
        else:
            e = tails.unpaired(x, np.array([taken[i].others for i in where]), margin)
        for field in ("effect", "low", "high", "sd", "p", "within", "beyond"):
            columns[field][where] = getattr(e, field)
        detectable[where] = power.detectable(n if both else min(n, k), paired=both) * e.sd
    tested = ~np.isnan(columns["effect"])
    # A place that could not be tested has p = 1 in every test.
    usable = {
        f: np.where(tested, columns[f], fill) for f, fill in (("effect", 0), ("p", 1), ("within", 1), ("beyond", 1))
    }
    judged = contrasts.judge(contrasts.Tests(**usable), [c.claim for c in comparisons], method)
    columns |= {"p": judged.p, "p_adjusted": judged.p_adjusted, "p_within": judged.p_within, "detectable": detectable}
    out = []
    for i, (c, t) in enumerate(zip(comparisons, taken, strict=True)):
        numbers = {k: _value(column[i]) if tested[i] else None for k, column in columns.items()}
        word = verdict(judged, i) if tested[i] and not t.reasons else "inconclusive"
        below = word == "supported" and bool(judged.below_margin[i])
        record = {"id": f"{family}/{c.arm}/{c.reference}/{c.endpoint}", "family": family, "family_size": m}
        record |= {"adjustment": method} | _record(c, t, runs, labels) | {"verdict": word, "below_margin": below}
        record |= {key: numbers[name] for key, name in NUMBERS.items()}
        record["interval"] = [numbers["low"], numbers["high"]] if tested[i] else None
        record["notes"] = t.notes if tested[i] else []
        out.append(record | {"text": sentence(record)})
    return out


NUMBERS = {
    "effect": "effect",
    "sd": "sd",
    "p": "p",
    "p_adjusted": "p_adjusted",
    "p_sign_flip": "flip",
    "p_within_margin": "p_within",
    "detectable": "detectable",
}
"""Fields of a finding, and the computed columns they are read from."""


def _record(c: Comparison, t: Taken, runs: Runs, labels: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a finding that need no test."""
    seeds, other = t.seeds
    return {
        "kind": "contrast",
        "arm": c.arm,
        "arm_label": labels.get(c.arm, c.arm),
        "reference": c.reference,
        "reference_label": labels.get(c.reference, c.reference),
        "endpoint": c.endpoint,
        "unit": "score" if c.endpoint.startswith(QA) else unit_of(c.endpoint),
        "claim": c.claim,
        "margin": c.margin,
        "reasons": t.reasons,
        **t.beside,
        "n": len(seeds) if t.paired else min(len(seeds), len(other)),
        "paired": t.paired,
        "seeds": sorted(set(seeds) | set(other)),
        "run_ids": [runs.run_ids[c.arm, s] for s in seeds] + [runs.run_ids[c.reference, s] for s in other],
    }


def verdict(judged: contrasts.Judged, i: int) -> str:
    """Return the word for place i of a family."""
    return "supported" if judged.supported[i] else "refuted" if judged.refuted[i] else "inconclusive"


@dataclass(frozen=True)
class Taken:
    """What one comparison takes from the runs."""

    seeds: tuple[list[int], list[int]]
    paired: bool
    reasons: list[str]
    notes: list[str]
    beside: dict[str, Any]
    group: tuple[bool, bool, int, int] | None = None
    """Paired, heavy tail, and the numbers of values: comparisons of one group are computed together. None: untested."""
    values: Sequence[float] = ()
    others: Sequence[float] = ()
    cost: float = 0.0


def _taken(c: Comparison, runs: Runs, *, same_runs: bool) -> Taken:
    a, b = runs.values.get((c.arm, c.endpoint), {}), runs.values.get((c.reference, c.endpoint), {})
    shared = sorted(a.keys() & b.keys())
    both = len(shared) >= 2
    modes = [text for text in (runs.modes(c.arm), runs.modes(c.reference)) if text]
    reasons = [c.blocked, *modes] if c.blocked else modes
    seeds = (shared, shared) if both else (sorted(a), sorted(b))
    if not both and min(len(a), len(b)) < 2:
        reasons = [*reasons, f"{len(a)} and {len(b)} runs: an interval needs two a side"]
        return Taken(seeds, both, reasons, [], tails.UNPAIRED)
    if modes:
        return Taken(seeds, both, reasons, [], tails.UNPAIRED)
    remarks = collapsed(c, runs)
    if not both:
        remarks += tails.notes(c.endpoint, 0, c.margin, 0.0)
        return Taken(
            seeds, both, reasons, remarks, tails.UNPAIRED, (False, False, len(a), len(b)), [*a.values()], [*b.values()]
        )
    differences = {s: a[s] - b[s] for s in shared}
    late, cost = ([], 0.0) if same_runs else late_runs(c, a, b, shared)
    if not same_runs:
        remarks += tails.notes(c.endpoint, len(shared), c.margin, cost)
    tail = tails.heavy(c.endpoint) is not None and not same_runs
    beside = tails.beside("" if same_runs else c.endpoint, differences, late)
    group = (True, tail, len(shared), 0)
    return Taken(seeds, both, reasons, remarks, beside, group, [*differences.values()], cost=cost)


def late_runs(
    c: Comparison, a: dict[int, float], b: dict[int, float], shared: list[int]
) -> tuple[list[tuple[str, int]], float]:
    """Return the outlying runs among the pairs, and what late runs alone could cost either side."""
    sides = [(c.arm, a), (c.reference, b)]
    late = [(arm, s) for arm, values in sides for s in tails.outlying(c.endpoint, values) if s in shared]
    n = len(shared)
    share = [sum(arm == name for name, _ in late) / n for arm, _ in sides]
    ways = ((share[0], n, share[1], n), (share[1], n, share[0], n))
    return late, max(float(tails.late_cost(c.endpoint, *way)) for way in ways)


def collapsed(c: Comparison, runs: Runs) -> list[str]:
    """Return, for a claim on balance, how many runs of each side collapsed and, by Wilson's interval, how many may."""
    if c.endpoint not in ENDPOINTS or ENDPOINTS[c.endpoint].part != "balance":
        return []
    out = []
    for side, arm in (("", c.arm), ("reference ", c.reference)):
        flags = runs.collapsed.get(arm, {})
        if flags:
            hit = sum(flags.values())
            high = float(power.wilson(hit, len(flags))[1])
            out.append(f"{side}{hit} of {len(flags)} (at most {high:.0%})")
    return [f"collapsed: {', '.join(out)}"] if out else []


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
    mean = f", mean {f['mean']:+.4g}" if f["statistic"] == "pseudomedian" else ""
    return f"{claim}: {f['verdict']}{extra} ({f['effect']:+.4g}, 95% interval {low:+.4g} to {high:+.4g}{mean}, n {f['n']})."
