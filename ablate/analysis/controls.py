"""Arms against dense controls: whether the task can tell layers apart, and the share of the gap that an arm recovers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ablate.analysis import contrasts
from ablate.analysis.frames import Tables
from ablate.analysis.verdicts import Comparison, Runs, findings
from ablate.config.endpoints import ENDPOINTS

GATE = 5.0  # margins that dense(active) must lose to dense(total) before a tree is compared with either
TOTAL, ACTIVE = "dense_total", "dense_active"
Activation = tuple[str, float, str]


@dataclass(frozen=True)
class Pair:
    """The dense controls that an arm is compared with."""

    arm: str
    total: str
    active: str
    own: bool
    """In the arm's activation, where the dense section has another."""


def controls(tables: Tables) -> set[str]:
    """Names of all controls."""
    return set(tables.trials.filter(pl.col("kind") == "control")["arm"])


def pairs(tables: Tables, order: list[str]) -> list[Pair]:
    """For every arm the controls in the dense section's activation, then those in its own, where there are any.

    The mixture of experts has the dense section's activation and is listed with the arms.
    """
    configs, known = _configs(tables), controls(tables)
    own: dict[Activation, dict[str, str]] = {}
    for name in known:
        base, _, other = name.partition(" ")
        if other:
            own.setdefault(_activation(configs[name].get("dense", {})), {})[base] = name
    out = []
    for arm in [*comparable(tables, [a for a in order if a not in known]), *(a for a in order if a == "moe")]:
        if {TOTAL, ACTIVE} <= known:
            out.append(Pair(arm, TOTAL, ACTIVE, own=False))
        mine = {} if arm == "moe" else own.get(_activation(configs[arm].get("tree", {})), {})
        if mine.keys() >= {TOTAL, ACTIVE}:
            out.append(Pair(arm, mine[TOTAL], mine[ACTIVE], own=True))
    return out


def comparable(tables: Tables, arms: list[str]) -> list[str]:
    """Return the arms with trees that learn what the controls learn: others do not compare with them."""
    configs = _configs(tables)
    tasks = [configs[name].get("task") for name in controls(tables)]
    return [
        arm
        for arm in arms
        if configs[arm].get("model", {}).get("feedforward", "tree") == "tree"
        and (not tasks or configs[arm].get("task") in tasks)
    ]


def _configs(tables: Tables) -> dict[str, dict[str, Any]]:
    """Each arm's settings, those of its first trial."""
    rows = tables.evaluation().unique("arm", keep="first", maintain_order=True)
    return {row["arm"]: json.loads(row["config"] or "{}") for row in rows.iter_rows(named=True)}


def _activation(section: dict[str, Any]) -> Activation:
    return section.get("activation", "gelu"), float(section.get("mirror", 0.0)), section.get("gain", "raw")


def assay(tables: Tables, runs: Runs, total: str = TOTAL, active: str = ACTIVE) -> dict[str, Any] | None:
    """Whether this task can tell a good layer from a poor one: what dense(active) loses to dense(total), in margins.

    It can (`sensitive`) where the whole 95% interval is at least five margins. None without both controls.
    """
    quality, margin = tables.study.quality, tables.study.margin
    best, poor = runs.values.get((total, quality.name), {}), runs.values.get((active, quality.name), {})
    if not best or not poor:
        return None
    gap = quality.sign * float(np.mean(list(poor.values())) - np.mean(list(best.values())))
    ids = [runs.run_ids[arm, s] for arm, v in ((active, poor), (total, best)) for s in v]
    shared = sorted(best.keys() & poor.keys())
    interval: list[float] | None = None
    if len(shared) >= 2:
        e = contrasts.paired([quality.sign * (poor[s] - best[s]) for s in shared])
        gap, interval = float(e.effect), [float(e.low), float(e.high)]
    return {
        "gap": gap,
        "interval": interval,
        "margins": gap / margin,
        "interval_margins": [end / margin for end in interval] if interval else None,
        "needed": GATE,
        "sensitive": interval is not None and interval[0] >= GATE * margin,
        "n": len(shared),
        "run_ids": ids,
    }


def insensitive(gap: dict[str, Any] | None) -> str:
    """Why a task cannot show how a tree compares with a dense layer; empty where it can."""
    if gap is None:
        return "no assay sensitivity known: the study has no dense_total and dense_active controls"
    if gap["sensitive"]:
        return ""
    if gap["interval"] is None:
        return "the task cannot tell: an interval of the gap between the dense layers needs two seeds that both have"
    low, high = gap["interval_margins"]
    return (
        f"the task cannot tell: dense layers of active and total size are {gap['margins']:.1f} margins apart "
        f"({low:.1f} to {high:.1f}), and all of that interval must be at least {gap['needed']:g}"
    )


def is_dense(arm: str) -> bool:
    """Return whether an arm is one of the dense controls that the gate is about, in whatever activation."""
    return arm.partition(" ")[0] in (TOTAL, ACTIVE)


def recovered(
    tables: Tables, runs: Runs, order: list[str], labels: dict[str, str], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Per arm and pair of controls: (active - arm) / (active - total), all three of quality, records like findings.

    The interval is Fieller's, over seeds that all three share; null where the gap is not apart from 0. The claim is that
    the share is above 0: p is that of the paired t test of the arm against dense(active), adjusted over this family.
    Inconclusive whatever the numbers where the gate fails (see `assay`): the task cannot tell.
    """
    wanted = [(p, gap) for p in pairs(tables, order) if (gap := assay(tables, runs, p.total, p.active))]
    margin, quality = tables.study.margin, tables.study.quality
    compared = [
        Comparison(p.arm, p.active, quality.name, quality.better, margin, insensitive(gap)) for p, gap in wanted
    ]
    if not compared:
        return []
    out = []
    found = findings(compared, runs, labels, family="recovered", method="bh", rng=rng)
    for f, (pair, gap) in zip(found, wanted, strict=True):
        arm, total, active = (runs.values.get((name, quality.name), {}) for name in (pair.arm, pair.total, pair.active))
        seeds = sorted(arm.keys() & total.keys() & active.keys())
        value: float | None = None
        interval: list[float] | None = None
        if len(seeds) >= 2 and not runs.modes(pair.arm):
            value, bounds = contrasts.ratio([active[s] - arm[s] for s in seeds], [active[s] - total[s] for s in seeds])
            interval = list(bounds) if bounds else None
        kept = ("family", "family_size", "adjustment", "arm", "arm_label", "verdict", "reasons", "p", "p_adjusted")
        record = {key: f[key] for key in kept} | {
            "id": f"recovered/{pair.arm}/{pair.active}",
            "kind": "recovered_share",
            "endpoint": quality.name,
            "unit": "share of the gap between dense(active) and dense(total)",
            "claim": "higher",
            "total": pair.total,
            "active": pair.active,
            "own_activation": pair.own,
            "gap": gap["gap"],
            "margins": gap["margins"],
            "effect": value,
            "interval": interval,
            "n": len(seeds),
            "seeds": seeds,
            "run_ids": [runs.run_ids[name, s] for name in (pair.arm, pair.active, pair.total) for s in seeds],
        }
        out.append(record | {"text": _sentence(record)})
    return out


def _sentence(r: dict[str, Any]) -> str:
    own = " in its own activation" if r["own_activation"] else ""
    start = f"{r['arm_label']} recovers some of the gap between dense layers of active and total units{own}: "
    if r["effect"] is None:
        return f"{start}{r['verdict']}."
    of = ENDPOINTS[r["endpoint"]]
    spread = f"{r['interval'][0]:+.0%} to {r['interval'][1]:+.0%}" if r["interval"] else "unbounded"
    verdict = "cannot tell" if any("cannot tell" in reason for reason in r["reasons"]) else r["verdict"]
    return (
        f"{start}{verdict} ({r['effect']:+.0%} of {r['gap']:{of.form}} {of.short}, 95% interval {spread}, n {r['n']})."
    )
