"""findings.json: everything a study showed, with the runs behind each number (schema: docs/findings.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ablate.analysis import arms, controls, rates, sections, tails
from ablate.analysis.capacity import capacity
from ablate.analysis.contrasts import ALPHA
from ablate.analysis.factors import analyse_factors
from ablate.analysis.families import drawn_balance, judge_all, judged
from ablate.analysis.frames import Tables, canonical, load
from ablate.analysis.mechanism import mechanism
from ablate.analysis.pruning import pruning
from ablate.analysis.restored import restored
from ablate.analysis.search.story import story
from ablate.analysis.text import name_text
from ablate.analysis.verdicts import Runs, sentence
from ablate.config import digest
from ablate.files import clear_stale, write_text
from ablate.results.layout import Layout

SCHEMA = "ablate.findings/1"


def analyse(name: str, root: Path) -> Path:
    """Write out/<name>/findings.json and metrics.json from a study's tables; returns the first path.

    The same tables give the same bytes. Raises ConfigError for a missing study file or table.
    """
    data = compute(load(name, root))
    folder = Layout(root, name).report
    clear_stale(folder)
    write_text(folder / "metrics.json", canonical(data["summary"]))
    return write_text(folder / "findings.json", canonical(data))


def generator(name: str) -> np.random.Generator:
    """The study's random numbers, from its name alone: reruns and added seeds draw from the same stream."""
    return np.random.default_rng(int(digest(name), 16))


def compute(tables: Tables) -> dict[str, Any]:
    """All findings of a study as plain data."""
    rng = generator(tables.name)
    frame = arms.outcomes(tables)
    names = arms.labels(tables)
    named = (c.endpoint for c in tables.study.contrasts if c.endpoint in frame.columns)
    margins = judged(tables.study)
    endpoints = list(dict.fromkeys([*margins, *named]))
    runs = Runs.of(frame, endpoints)
    summaries = arms.summaries(tables)
    gap = controls.assay(tables, runs)
    found, families = judge_all(tables, runs, gap, rng)
    finished = Runs.of(frame.filter(frame["status"] == "finished"), endpoints)
    for f in found:
        f["finished_only"] = without_diverged(f, runs, finished)
    power = sections.seeds_and_power(found, margins)
    measured = {e: m for e, m in margins.items() if frame[e].count()}
    factors = analyse_factors(tables, frame, runs, measured, rng)
    for f in factors["findings"]:
        f["text"] = sentence(f)
    if factors["findings"]:
        what = "levels of each factor against its base level; simple effects where an interaction stands"
        families.append(
            {"family": "factors", "adjustment": "bh", "size": len(factors["findings"]), "what": what, "alpha": ALPHA}
        )
    found += factors["findings"]
    recovered = controls.recovered(tables, runs, arms.order(tables), names, rng)
    if recovered:
        what = "share of the gap between dense layers of active and total units that each arm recovers"
        families.append(
            {"family": "recovered", "adjustment": "bh", "size": len(recovered), "what": what, "alpha": ALPHA}
        )
    # Random numbers of its own: runs pruned later change nothing else.
    removal = pruning(tables, names, generator(f"{tables.name}/pruning"))
    if removal:
        what = f"{tables.study.quality.short} without dead subtrees, against the whole model and against as many other units removed"
        families.append({"family": "pruning", "adjustment": "bh", "size": len(removal), "what": what, "alpha": ALPHA})
    reference = arms.reference_arm(tables)
    balanced = restored(tables, runs, frame, reference)
    tuned = rates.learning_rates(tables)
    rates.name_rates(tables, found, tuned)
    name_text(tables, found)
    rates.withhold_restored(balanced, reference, tuned)
    searched = tables.study.design == "search"
    whole, importance = story(tables, generator(f"{tables.name}/search")) if searched else ({}, [])
    curves = capacity(tables, frame, names)
    return {
        "schema": SCHEMA,
        "study": tables.name,
        "title": tables.study.title,
        "notes": tables.study.notes,
        "design": tables.study.design,
        "reference": reference,
        "margin": tables.study.margin,
        "min_effect_n_eff": tables.study.min_effect_n_eff,
        "seeds": tables.study.seeds,
        "inputs": tables.digests,
        "plan_hash": tables.plan.get("hash"),
        "plan_notes": [str(n) for n in tables.plan.get("notes") or []],
        "deviations": sections.deviations(tables),
        "families": families,
        "findings": found,
        "arms": summaries,
        "restored": balanced,
        "effects": {k: factors[k] for k in ("terms", "withheld", "left_out", "cells")},
        "importance": importance,
        "collapse": sections.collapse(runs, arms.order(tables), margins),
        "pareto": None if searched else sections.front(tables, frame, drawn_balance(tables.study), rng),
        "rate_rule": rates.rule_of(tables),
        "learning_rates": tuned,
        "power": power,
        "mechanism": mechanism(tables, frame, found),
        "twins": sections.twins(tables, frame, runs),
        "assay": gap,
        "recovered": recovered,
        "pruning": removal,
        "exclusions": arms.exclusions(tables),
        "summary": summary(tables, found, [] if searched else summaries) | best_candidates(whole),
        **({"search": whole} if searched else {}),
        **({"capacity": curves} if curves else {}),
    }


def best_candidates(search: dict[str, Any]) -> dict[str, Any]:
    """A search's first choice in the summary: its mean on fresh seeds where there is one; empty for other designs."""
    first = next((c for c in search.get("candidates", []) if c["rank"] == 1), None)
    if first is None:
        return {}
    measured = (first["fresh"] or first["racing"]).items()
    return {"best_candidate": first["arm"], **{f"best_candidate_{o}": m["mean"] for o, m in measured}}


def without_diverged(f: dict[str, Any], runs: Runs, finished: Runs) -> dict[str, Any] | None:
    """The comparison on finished runs alone, beside the intention to treat; None where no run of it diverged."""
    pair = [(f["arm"], f["endpoint"]), (f["reference"], f["endpoint"])]
    if all(len(runs.values.get(k, {})) == len(finished.values.get(k, {})) for k in pair):
        return None
    a, b = (finished.values.get(k, {}) for k in pair)
    shared = sorted(a.keys() & b.keys())
    if len(shared) < 2:
        return {"effect": None, "interval": None, "n": len(shared)}
    e = tails.locate([a[s] - b[s] for s in shared], 0.0, tail=tails.heavy(f["endpoint"]) is not None)
    return {"effect": float(e.effect), "interval": [float(e.low), float(e.high)], "n": len(shared)}


def summary(tables: Tables, found: list[dict[str, Any]], summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The few numbers `dvc metrics` shows."""
    counts = {v: sum(f["verdict"] == v for f in found) for v in ("supported", "refuted", "inconclusive")}
    out: dict[str, Any] = {"trials": tables.trials.height, **counts}
    for endpoint in (tables.study.quality, drawn_balance(tables.study)):
        best = min if endpoint.better == "lower" else max
        values = {a["label"]: a[endpoint.name]["mean"] for a in summaries if a[endpoint.name]}
        if values:
            out[f"best_{endpoint.name}"] = best(values.values())
            out[f"best_{endpoint.name}_arm"] = best(values, key=values.__getitem__)
    return out
