"""Families of tests: which comparisons a study makes, which are adjusted together, and which are not asked yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np

from ablate.analysis import arms, controls
from ablate.analysis.contrasts import ALPHA, Claim
from ablate.analysis.frames import Tables
from ablate.analysis.verdicts import Comparison, Runs, findings
from ablate.config import Study
from ablate.config.endpoints import BITS_LOST, ENDPOINTS, EQUIVALENT, N_EFF, Endpoint

Method = Literal["holm", "bh"]
Family = tuple[str, Method, str, list[Comparison]]
DEPTH_FACTOR = "tree.depth"
COST = "cost"
"""The claims that an arm matches another in quality: asked of an arm once its claims on balance are supported."""


def depth_varies(study: Study) -> bool:
    """Return whether arms differ in depth, so that n_eff_frac does not compare between them."""
    return DEPTH_FACTOR in study.factors or any(DEPTH_FACTOR in arm for arm in study.arms.values())


def judged(study: Study) -> dict[str, float]:
    """Return the endpoints that every comparison of a study judges, quality and balance, with their margins.

    Where depth varies between arms, balance is judged by bits lost first, which compares across depths.
    """
    balance = (BITS_LOST, N_EFF) if depth_varies(study) else (N_EFF,)
    return {endpoint.name: endpoint.margin_of(study) for endpoint in (study.quality, *balance)}


def drawn_balance(study: Study) -> Endpoint:
    """Return the balance that arms are drawn and ranked by: n_eff_frac, where depth varies at the depth that compares."""
    return EQUIVALENT if depth_varies(study) else N_EFF


def judge_all(
    tables: Tables, runs: Runs, gap: dict[str, Any] | None, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the findings of every family of contrasts, and the families."""
    names = arms.labels(tables)
    found: list[dict[str, Any]] = []
    families: list[dict[str, Any]] = []
    for family, method, what, comparisons in plan(tables, runs, gap):
        if not comparisons:
            continue
        shut = {c: _shut(c, found) for c in comparisons} if family == COST else {}
        asked = [c for c in comparisons if not shut.get(c)]
        rest = [replace(c, blocked=shut[c]) for c in comparisons if shut.get(c)]
        own = findings(asked, runs, names, family=family, method=method, rng=rng)
        for f in findings(rest, runs, names, family=family, method=method, rng=rng):
            own.append(f | {"family_size": len(asked), "p_adjusted": None, "p_within_margin": None})
        place = {(c.arm, c.reference, c.endpoint): i for i, c in enumerate(comparisons)}
        found += sorted(own, key=lambda f: place[f["arm"], f["reference"], f["endpoint"]])
        families.append({"family": family, "adjustment": method, "size": len(asked), "what": what, "alpha": ALPHA})
    return found, families


def _shut(c: Comparison, found: list[dict[str, Any]]) -> str:
    """Return why the price of an arm is not asked: a claim on its balance is not supported."""
    on = [f for f in found if (f["arm"], f["reference"]) == (c.arm, c.reference) and _balance(f["endpoint"])]
    missed = [f["endpoint"] for f in on if f["verdict"] != "supported"]
    return f"not asked: the claim on {missed[0]} is not supported" if missed else ""


def _balance(endpoint: str) -> bool:
    return endpoint in ENDPOINTS and ENDPOINTS[endpoint].part == "balance"


def plan(tables: Tables, runs: Runs, gap: dict[str, Any] | None) -> list[Family]:
    """Return which comparisons a study makes: the named contrasts (Holm), then exploratory ones (Benjamini-Hochberg)."""
    study = tables.study
    reference = arms.reference_arm(tables)
    known = controls.controls(tables)
    order = arms.order(tables)
    grid = [a for a in order if a != reference and a not in known]
    margins = judged(study)
    early = interim(tables)
    named = [
        Comparison(
            c.arm,
            c.reference,
            c.endpoint,
            cast(Claim, c.claim),
            c.margin,
            "; ".join(filter(None, (early, _insensitive(c.reference, gap)))),
        )
        for c in study.contrasts
    ]
    cost = [c for c in named if c.claim == "matches" and not _balance(c.endpoint)]
    measured = [e for e in margins if any(endpoint == e for _, endpoint in runs.values)]
    against = [Comparison(a, reference, e, "differs", margins[e]) for a in grid for e in measured if reference]
    trees = controls.comparable(tables, [a for a in [reference, *grid] if a])
    return [
        ("confirm", "holm", "contrasts named in the study before the first trial", [c for c in named if c not in cost]),
        (
            "bits",
            "holm",
            "the named claims on n_eff_frac in bits lost, which compares across depths",
            _in_bits(study, named),
        ),
        (COST, "holm", "named claims of equal quality, asked where the arm's balance is supported", cost),
        ("arms", "bh", "every arm against the reference arm", [] if named else against),
        ("dense", "bh", "every tree arm against the controls", _dense(tables, runs, trees, known, gap)),
    ]


def _in_bits(study: Study, named: list[Comparison]) -> list[Comparison]:
    """Return, where depth varies, the claims on n_eff_frac as claims on bits lost, unless the study names those itself."""
    if not depth_varies(study):
        return []
    own = {(c.arm, c.reference) for c in named if c.endpoint == BITS_LOST.name}
    turned: dict[Claim, Claim] = {"higher": "lower", "lower": "higher", "matches": "matches", "differs": "differs"}
    margin = BITS_LOST.margin_of(study)
    return [
        replace(c, endpoint=BITS_LOST.name, claim=turned[c.claim], margin=margin)
        for c in named
        if c.endpoint == N_EFF.name and (c.arm, c.reference) not in own
    ]


def _dense(
    tables: Tables, runs: Runs, trees: list[str], known: set[str], gap: dict[str, Any] | None
) -> list[Comparison]:
    """Return the comparisons of tree arms with the controls, on quality."""
    quality, margin = tables.study.quality, tables.study.margin
    out: list[Comparison] = []
    for control, claim in (
        ("dense_total", "matches"),
        ("dense_active", quality.better),
        ("dense_none", quality.better),
    ):
        if control in known:
            block = _insensitive(control, gap)
            out += [Comparison(a, control, quality.name, cast(Claim, claim), margin, block) for a in trees]
    for pair in controls.pairs(tables, trees):
        if pair.own:
            block = controls.insensitive(controls.assay(tables, runs, pair.total, pair.active))
            out.append(Comparison(pair.arm, pair.total, quality.name, "matches", margin, block))
            out.append(Comparison(pair.arm, pair.active, quality.name, quality.better, margin, block))
    if "moe" in known:
        out += [Comparison(a, "moe", quality.name, "differs", margin) for a in trees]
    return out


def _insensitive(reference: str, gap: dict[str, Any] | None) -> str:
    """Return why the gate forbids a comparison with `reference`; empty where it is no dense layer or the gate is passed."""
    return controls.insensitive(gap) if controls.is_dense(reference) else ""


def interim(tables: Tables) -> str:
    """Return why a `confirm` study decides nothing yet: planned trials of its arms have no result; "" where all have.

    A look at a study that is not over would be one more chance for every claim, so it shows numbers and no verdict.
    """
    planned = tables.plan.get("trials")
    if tables.study.design != "confirm" or not isinstance(planned, list):
        return ""
    names = {t.get("trial") for t in planned if isinstance(t, dict) and t.get("kind") in {"arm", "control"}}
    open_ = len(names - set(tables.trials["trial"])) + int(tables.plan.get("waiting_for_tune") or 0)
    return f"interim look: {open_} planned trials have no result yet" if open_ else ""
