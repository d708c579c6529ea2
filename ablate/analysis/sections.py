"""Parts of findings.json beside the comparisons: collapse, Pareto front, power, A/A twins, deviations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl

from ablate.analysis import contrasts, pareto, power, tails
from ablate.analysis.frames import Tables
from ablate.analysis.rates import learning_rates
from ablate.analysis.verdicts import Runs
from ablate.config.endpoints import N_EFF, Endpoint
from ablate.kernels.spec import is_identity


def collapse(runs: Runs, order: list[str], endpoints: Iterable[str]) -> dict[str, Any]:
    """Probability of collapse per arm with Wilson intervals, whether runs split into modes, and equality of spreads."""
    rows = []
    for arm in order:
        flags = runs.collapsed.get(arm)
        if not flags:
            continue
        hit, n = sum(flags.values()), len(flags)
        low, high = power.wilson(hit, n)
        values, which = np.array(list(runs.bits_lost[arm].values())), np.array(list(flags.values()))
        rows.append(
            {
                "arm": arm,
                "collapsed": hit,
                "n": n,
                "probability": hit / n,
                "interval": [float(low), float(high)],
                "separation": _finite(power.separation(values, which)),
                "modes": runs.modes(arm),
                "run_ids": [runs.run_ids[arm, s] for s in flags],
            }
        )
    spreads = {}
    for endpoint in endpoints:
        groups = [np.array(list(v.values())) for (_, e), v in sorted(runs.values.items()) if e == endpoint]
        spreads[endpoint] = power.brown_forsythe(groups)
    return {"arms": rows, "brown_forsythe": spreads}


def _finite(x: Any) -> float | None:
    return float(x) if math.isfinite(x) else None


def front(tables: Tables, frame: pl.DataFrame, balance: Endpoint, rng: np.random.Generator) -> dict[str, Any] | None:
    """Pareto front of the arms' means over quality and balance; diverged runs count with the untrained model's quality.

    The reference corner of the hypervolume is fixed: balance 0, and the quality of the untrained model.
    """
    quality = tables.study.quality
    q, n_eff = quality.name, balance.name
    rows = frame.filter(pl.col(q).is_not_null() & pl.col(n_eff).is_not_null()).sort("arm", "seed")
    groups = {k[0]: g for k, g in rows.partition_by("arm", as_dict=True, maintain_order=True).items()}
    starts = tables.trials[quality.start].drop_nulls()
    if not groups or starts.is_empty():
        return None
    corner = (float(starts.median()), 0.0)  # type: ignore[arg-type]
    # Lower is better on the first axis, whatever the endpoint.
    names = list(groups)
    found = pareto.over_seeds(
        [quality.sign * groups[a][q].to_numpy() for a in names],
        [groups[a][n_eff].to_numpy() for a in names],
        (quality.sign * corner[0], corner[1]),
        rng,
    )
    rows_out = [
        {
            "arm": a,
            q: float(groups[a][q].to_numpy().mean()),
            n_eff: float(groups[a][n_eff].to_numpy().mean()),
            "on_front": found["front"][i],
            "probability": found["probability"][i],
            "n": groups[a].height,
            "run_ids": groups[a]["run_id"].to_list(),
        }
        for i, a in enumerate(names)
    ]
    return {
        "balance": n_eff,
        "reference_point": {q: corner[0], n_eff: corner[1]},
        "hypervolume": found["hypervolume"],
        "interval": found["interval"],
        "arms": rows_out,
    }


def seeds_and_power(found: list[dict[str, Any]], margins: dict[str, float]) -> list[dict[str, Any]]:
    """Per endpoint: what the design could see, from the median paired sd, and the seeds that each question would need.

    Three questions have three answers: to find a difference of the margin, to show arms equal within it, and to show one no
    worse. On an endpoint with a heavy tail the last two are at the level of a 95% interval, and enough pairs to rule out that
    late runs cost the margin are counted in.
    """
    out = []
    for endpoint, margin in margins.items():
        rows = [f for f in found if f["endpoint"] == endpoint and f["sd"] and f["paired"] and f["kind"] == "contrast"]
        if not rows:
            continue
        sd = float(np.median([f["sd"] for f in rows]))
        n = int(np.median([f["n"] for f in rows]))
        tail = tails.heavy(endpoint) is not None
        alpha = contrasts.ALPHA / 2 if tail else contrasts.ALPHA
        unseen = tails.pairs_without_late_runs(endpoint, margin)
        shown = [power.seeds_to_show(margin / sd, one_sided=side, alpha=alpha) for side in (False, True)]
        equal, no_worse = (None if k is None else max(k, unseen) for k in shown)
        out.append(
            {
                "endpoint": endpoint,
                "margin": margin,
                "paired_sd": sd,
                "n": n,
                "detectable": power.detectable(n, paired=True) * sd,
                "seeds_for_margin": power.seeds_to_find(margin / sd),
                "seeds_to_match": equal,
                "seeds_for_no_worse": no_worse,
                "smallest_sign_flip_p": 2.0 ** (1 - n),
                "comparisons": len(rows),
            }
        )
    return out


def twins(tables: Tables, frame: pl.DataFrame, runs: Runs) -> list[dict[str, Any]]:
    """A/A test: arms that are one model by construction (mirror -1 of an odd-identity base at two placements)."""
    groups: dict[str, list[str]] = {}
    for row in (
        frame.filter(pl.col("kind") == "arm").unique("arm", keep="first", maintain_order=True).iter_rows(named=True)
    ):
        tree = _config(row["config"]).get("tree") or {}
        own = float(tree.get("mirror", 0.0))
        mirrors = {own, own if tree.get("node_mirror") is None else float(tree["node_mirror"])}
        # Where phi is the identity, all placements are one model: a free A/A test.
        linear = all(is_identity(tree.get("activation", "gelu"), mirror) for mirror in mirrors)
        if linear and tree.get("gain", "raw") == "raw":
            rest = {k: v for k, v in _config(row["config"]).items() if k not in {"init_seed", "data_seed"}}
            rest["tree"] = {k: v for k, v in tree.items() if k != "placement"}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(row["arm"])
    out = []
    for members in groups.values():
        first, *others = sorted(members)
        for other in others:
            for endpoint in (tables.study.quality.name, N_EFF.name):
                a, b = runs.values.get((first, endpoint), {}), runs.values.get((other, endpoint), {})
                shared = sorted(a.keys() & b.keys())
                if len(shared) < 2:
                    continue
                e = contrasts.paired([b[s] - a[s] for s in shared])
                ids = [runs.run_ids[arm, s] for arm in (first, other) for s in shared]
                interval = [float(e.low), float(e.high)]
                out.append(
                    {
                        "arms": [first, other],
                        "endpoint": endpoint,
                        "effect": float(e.effect),
                        "interval": interval,
                        "p": float(e.p),
                        "n": len(shared),
                        "run_ids": ids,
                    }
                )
    return out


def _config(text: str | None) -> dict[str, Any]:
    try:
        data = json.loads(text or "{}")
    except json.JSONDecodeError:
        return {}
    return data if isinstance(data, dict) else {}


def deviations(tables: Tables) -> list[str]:
    """How the trials differ from the plan, in words; empty where they do not."""
    plan = tables.plan
    if not plan:
        return ["There is no plan.json: which trials were planned is not known."]
    out = []
    planned = plan.get("trials")
    if isinstance(planned, list) and plan.get("design") != "search":
        names = {t.get("trial") for t in planned if isinstance(t, dict)}
        have = set(tables.trials["trial"])
        if names - have:
            out.append(f"{len(names - have)} of {len(names)} planned trials have no result yet.")
        if have - names:
            out.append(f"{len(have - names)} trials are not in the plan.")
    if plan.get("waiting_for_tune"):
        out.append(f"{plan['waiting_for_tune']} trials still wait for a learning rate.")
    for column, what in (
        ("git_commit", "commits"),
        ("data_hash", "data sets"),
        ("tokenizer_hash", "tokenizers"),
        ("machine", "machine types"),
    ):
        values = sorted(tables.trials[column].drop_nulls().unique().to_list())
        if len(values) > 1:
            out.append(f"Trials come from {len(values)} {what}: {', '.join(v[:24] for v in values)}.")
    if tables.trials["git_dirty"].fill_null(False).any():
        out.append(f"{int(tables.trials['git_dirty'].sum())} trials ran with uncommitted changes.")
    edge = [r["arm"] for r in learning_rates(tables) if r["interior"] is False]
    if edge:
        out.append(
            f"Best learning rate at the edge of those tried, so not an interior optimum: {', '.join(map(str, edge))}."
        )
    return out
