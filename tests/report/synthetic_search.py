"""Tables of a search with a planted landscape: depth decides quality, the mirror balance, the initialisation nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ablate.config import Study
from ablate.results.columns import HISTORY_SCHEMA, TRIALS_SCHEMA
from tests.report.synthetic import STEPS, table

BEST_DEPTH = 5
NOISE = 0.004
RACE, FRESH = (0, 1, 2), (100, 101, 102, 103)
FACTORS: dict[str, Any] = {
    "tree.depth": {"range": {"low": 2, "high": 8, "integer": True}},
    "tree.leaf_width": [1, 2, 4],
    "tree.mirror": {"range": {"low": -1, "high": 1}},
    "tree.init": ["uniform", "zero_bias", "orthogonal"],
}
CONDITIONAL: dict[str, Any] = {
    "tree.placement": ["unit", "sum"],
    "tree.node_mirror": {"range": {"low": -1, "high": 1}, "when": {"tree.placement": "unit"}},
}


def write_search(
    root: Path,
    name: str = "hunt",
    *,
    count: int = 40,
    objectives: tuple[str, ...] = ("bpb", "n_eff_frac"),
    factors: dict[str, Any] | None = None,
    match: str = "none",
    finalists: int = 3,
    race: tuple[int, ...] = RACE,
    diverged: str = "one",
    noise: float = NOISE,
    title: str = "Synthetic search",
    with_plan: bool = True,
    base_first: bool = True,
    spelled: bool = False,
    seed: int = 7,
) -> dict[str, tuple[float, float]]:
    """Write the study file, plan and tables of a search under `root`; return each candidate's true bpb and n_eff_frac.

    `diverged` is none, one or all. Racing stops a candidate after its first seed where it is clearly worse than the
    best so far, as an engine would. With `spelled`, the base's candidate says what mirror its nodes have, as a search does.
    """
    rng = np.random.default_rng(seed)
    factors = FACTORS if factors is None else factors
    study: dict[str, Any] = {
        "name": name,
        "title": title,
        "design": "search",
        "objectives": list(objectives),
        "budget": {"trials": count},
        "factors": factors,
        "match": match,
        "seeds": list(race),
        "base": {"train": {"steps": 300, "eval_every": 50}},
    }
    (root / "studies").mkdir(parents=True, exist_ok=True)
    (root / "studies" / f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    base = Study.model_validate(study).trial({})
    offsets = {s: rng.normal(0, 0.003) for s in (*race, *FRESH)}
    truth: dict[str, tuple[float, float]] = {}
    rows: list[dict[str, Any]] = []
    measured: dict[str, float] = {}
    for i in range(count):
        arm = f"c{i + 1:03d}"
        values = {f: getattr(base.tree, f.partition(".")[2]) for f in factors}
        if i or not base_first:
            for f, spec in factors.items():
                values[f] = _draw(spec, rng)
            for f, spec in factors.items():
                if isinstance(spec, dict) and any(values[k] != v for k, v in spec.get("when", {}).items()):
                    values[f] = None
        if spelled and i == 0:
            values["tree.node_mirror"] = values["tree.mirror"]
        if match != "none":
            units = 2 ** values.get("tree.depth", 6) * (1 + values.get("tree.leaf_width", 4))
            values["tree.trees"] = max(1, round(1276 / units))
        truth[arm] = _landscape(values)
        lost = diverged == "all" or (diverged == "one" and i == count - 1)
        for s in race:
            row = _run(arm, "search", s, values, truth[arm], offsets[s], noise, rng, lost=lost)
            rows.append(row)
            best = min(measured.values(), default=np.inf)
            measured[arm] = min(measured.get(arm, np.inf), row["bpb"] or np.inf)
            if lost or row["bpb"] > best + 4 * noise:
                break
    if diverged != "all":
        full = [a for a in truth if sum(r["arm"] == a and r["bpb"] is not None for r in rows) == len(race)]
        best_of = sorted(full, key=lambda a: float(np.mean([r["bpb"] for r in rows if r["arm"] == a])))[:finalists]
        settings = {r["arm"]: r["values"] for r in rows}
        rows += [_run(a, "finalist", s, settings[a], truth[a], offsets[s], noise, rng) for a in best_of for s in FRESH]
    columns = list(dict.fromkeys(k for r in rows for k in r["values"]))
    trials, history = [], []
    for i, row in enumerate(rows):
        trial, evaluations = _tables(row, name, f"{i:012x}", columns)
        trials.append(trial)
        history += evaluations
    folder = root / "tables" / name
    folder.mkdir(parents=True, exist_ok=True)
    table(trials, TRIALS_SCHEMA).write_parquet(folder / "trials.parquet")
    table(history, HISTORY_SCHEMA).write_parquet(folder / "history.parquet")
    plan: dict[str, Any] = {"study": name, "design": "search", "hash": "0123456789ab", "trials": []}
    if with_plan:
        plan["search"] = {
            "sampler": "tpe",
            "race_seeds": list(race),
            "finalist_seeds": list(FRESH) if finalists else [],
            "candidates": [{"arm": a, "origin": "sampled", "out": None} for a in truth],
            "left_out": ["Depth 8 at leaf width 4 comes no closer than 2,559 units to the base's 1,276."],
            "held": ["train.lr is 0.003 for every candidate."],
        }
    (root / "results" / name).mkdir(parents=True, exist_ok=True)
    (root / "results" / name / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return truth


def _draw(spec: Any, rng: np.random.Generator) -> Any:
    levels = spec if isinstance(spec, list) else spec.get("levels")
    if levels:
        return levels[rng.integers(len(levels))]
    limits = spec["range"]
    if limits.get("integer"):
        return int(rng.integers(limits["low"], limits["high"] + 1))
    return float(rng.uniform(limits["low"], limits["high"]))


def _landscape(values: dict[str, Any]) -> tuple[float, float]:
    """True bpb and n_eff_frac: a bowl over depth with its bottom at BEST_DEPTH, balance rising with the mirror."""
    depth, width = values.get("tree.depth", BEST_DEPTH), values.get("tree.leaf_width", 4)
    mirror = values.get("tree.mirror", 0.0)
    bpb = 2.0 + 0.02 * (depth - BEST_DEPTH) ** 2 + 0.01 * (width == 1) + 0.03 * (mirror > 0) * mirror
    return bpb, 0.55 + 0.3 * np.tanh(1.5 * mirror) - 0.02 * (width == 4)


def _run(
    arm: str,
    kind: str,
    seed: int,
    values: dict[str, Any],
    truth: tuple[float, float],
    offset: float,
    noise: float,
    rng: np.random.Generator,
    *,
    lost: bool = False,
) -> dict[str, Any]:
    bpb, n_eff = truth[0] + offset + rng.normal(0, noise), truth[1] + rng.normal(0, 2 * noise)
    return {"arm": arm, "kind": kind, "seed": seed, "values": values, "lost": lost} | {
        "bpb": None if lost else float(bpb),
        "n_eff_frac": float(np.clip(n_eff, 0, 1)),
    }


def _tables(
    row: dict[str, Any], name: str, trial: str, columns: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    steps = np.array(STEPS)
    end = row["bpb"] or 2.0
    curve = end + (8.0 - end) * np.exp(-steps / 40.0) - (8.0 - end) * np.exp(-steps[-1] / 40.0) * (steps > 0)
    balance = np.interp(steps, [0, 60, 300], [0.78, 0.35, row["n_eff_frac"]])
    if row["lost"]:
        steps, curve = steps[:4], np.r_[curve[:3], np.nan]
    common = {"study": name, "trial": trial, **{k: row[k] for k in ("arm", "kind", "seed")}}
    history = [
        {
            **common,
            "step": int(s),
            "tokens": int(s) * 2048,
            "bpb": float(b),
            "train_loss": None if s == 0 else float(b),
            "lr": 3e-3,
            "n_eff_frac": float(n),
            "dead_frac": float(0.3 * (1 - n)),
            "bits_lost": float(1 - n),
        }
        for s, b, n in zip(steps, curve, balance, strict=False)
    ]
    tree = {k.partition(".")[2]: v for k, v in row["values"].items()}
    return {
        **common,
        "status": "diverged" if row["lost"] else "finished",
        "run_id": hashlib.md5(f"{name}{trial}".encode()).hexdigest(),
        **{f"factor.{k}": row["values"].get(k) for k in columns},
        "lr": 3e-3,
        "config": json.dumps({"tree": tree, "train": {"lr": 3e-3}, "init_seed": row["seed"]}),
        "bpb": row["bpb"],
        "bpb_start": 8.0,
        "train_loss": 4.4,
        **dict.fromkeys(("n_eff_frac", "n_eff_frac_worst"), None if row["lost"] else row["n_eff_frac"]),
        "dead_frac": 0.3 * (1 - row["n_eff_frac"]),
        "bits_lost": 1 - row["n_eff_frac"],
        "collapse": 0.0,
        "n_eff_frac_start": 0.78,
        "n_eff_frac_min": 0.35,
        "dead_frac_start": 0.05,
        "dead_frac_max": 0.2,
        "pruned_frac": 0.01,
        "revived_frac": 0.01,
        "total_units": 1276.0,
        "active_units": 40.0,
        "active_frac": 40 / 1276,
        "total_params": 1_800_000.0,
        "active_params": 700_000.0,
        "flops_per_token": 1_500_000.0,
        "tokens": 300 * 2048.0,
        "seconds": 31.0,
        "tokens_per_second": 19800.0,
        "git_commit": "30ec799" + "0" * 33,
        "git_dirty": False,
        "data_hash": "d" * 12,
        "tokenizer_hash": "e" * 12,
        "machine": "Synthetic CPU",
        "threads": 2.0,
        "device": "cpu",
        "message": "loss is not finite at step 100" if row["lost"] else "",
    }, history
