"""Synthetic but realistic tables of a study, for tests, for looking at reports, and for the ten-thousand-trials
check.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from ablate.results.columns import HISTORY_SCHEMA, TRIALS_SCHEMA, USAGE_TABLE_SCHEMA

STEPS = (0, 25, 50, 100, 150, 200, 250, 300)
LAYERS, TREES, DEPTH, TOKENS = 4, 4, 6, 65536
FACTORS: dict[str, list[Any]] = {
    "tree.mirror": [0.0, 1.0],
    "tree.placement": ["unit", "tree"],
    "tree.routing": ["sign", "centred"],
}


def write_study(
    root: Path,
    name: str = "demo",
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    factors: dict[str, list[Any]] | None = None,
    controls: bool = True,
    tune: bool | str = True,
    usage: int = 10**6,
    diverged: bool = True,
    title: str = "Synthetic study",
    arms: dict[str, dict[str, Any]] | None = None,
    contrasts: list[dict[str, Any]] | None = None,
    machine: str = "Synthetic CPU",
    seed: int = 7,
) -> None:
    """Write studies/<name>.yaml, results/<name>/plan.json and tables/<name>/*.parquet under `root`."""
    rng = np.random.default_rng(seed)
    factors = FACTORS if factors is None else factors
    grid = [dict(zip(factors, levels, strict=True)) for levels in itertools.product(*factors.values())]
    if contrasts:
        named = {"reference": {}, **(arms or {})}
    else:
        named = {",".join(f"{k}={v}" for k, v in g.items()): g for g in grid} | (arms or {})
    study: dict[str, Any] = {
        "name": name,
        "title": title,
        "design": "confirm" if contrasts else "factorial",
        "factors": {} if contrasts else factors,
        "arms": arms or {},
        "contrasts": contrasts or [],
        "controls": ["total", "active"] if controls else [],
        "seeds": list(seeds),
    }
    rates, tuning = ((1.5e-3, 3e-3, 6e-3), (100, 101, 102)) if tune == "bracket" else ((1e-3, 3e-3, 1e-2), (100,))
    if tune:
        grid_of = {"lr": list(rates), "seeds": list(tuning)}
        study["tune"] = {"seeds": list(tuning)} if tune == "bracket" else grid_of
    (root / "studies").mkdir(parents=True, exist_ok=True)
    (root / "studies" / f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    keys = list(dict.fromkeys(itertools.chain.from_iterable(a for a in named.values()))) or list(factors)
    base = {"tree.mirror": 0.0, "tree.placement": "unit", "tree.routing": "sign", "tree.router": "tied"}
    base["tree.node_backward"] = "own"
    rows: list[dict[str, Any]] = []
    for arm, changes in named.items():
        values = {k: changes.get(k, base.get(k)) for k in keys}
        rows += [{"arm": arm, "kind": "arm", "seed": s, "values": values, "lr": 3e-3} for s in seeds]
        if tune:
            tried = itertools.product(tuning, rates)
            rows += [{"arm": arm, "kind": "tune", "seed": s, "values": values, "lr": lr} for s, lr in tried]
    if controls:
        rows += [
            {"arm": f"dense_{c}", "kind": "control", "seed": s, "values": dict.fromkeys(keys), "lr": 3e-3}
            for c in ("total", "active")
            for s in seeds
        ]
    for i, row in enumerate(rows):
        row["trial"] = f"{i:012x}"
        row["diverged"] = False
    if diverged:
        last = [r for r in rows if r["kind"] == "arm"][-1]
        last["diverged"] = True
    trials: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    tables: list[pl.DataFrame] = []
    offsets = {s: rng.normal(0, 0.004) for s in (*seeds, *tuning)}
    for row in rows:
        trial, hist, frame = _one(row, name, keys, offsets[row["seed"]], rng, machine)
        trials.append(trial)
        history += hist
        if len(tables) < usage and frame is not None and row["kind"] == "arm":
            tables.append(frame)
    folder = root / "tables" / name
    folder.mkdir(parents=True, exist_ok=True)
    table(trials, TRIALS_SCHEMA).write_parquet(folder / "trials.parquet")
    table(history, HISTORY_SCHEMA).write_parquet(folder / "history.parquet")
    if tables:
        table(pl.concat(tables), USAGE_TABLE_SCHEMA).write_parquet(folder / "usage.parquet")
    results = root / "results" / name
    results.mkdir(parents=True, exist_ok=True)
    plan = {
        "study": name,
        "design": "factorial",
        "hash": "0123456789ab",
        "space": "s" * 12,
        "seeds": sorted({r["seed"] for r in rows}),
        "objectives": ["bpb"],
        "notes": [],
        "arms": [{"label": arm} for arm in sorted({r["arm"] for r in rows})],
        "trials": [{k: r[k] for k in ("trial", "arm", "seed", "kind", "lr")} | {"factors": {}} for r in rows],
        "waiting_for_tune": 0,
        "tuned": {},
    }
    (results / "plan.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")


def table(rows: Any, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Rows as a table with every column of `schema`, null where nothing was measured."""
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return frame.with_columns(pl.lit(None, dtype).alias(c) for c, dtype in schema.items() if c not in frame.columns)


def _one(
    row: dict[str, Any], name: str, keys: list[str], offset: float, rng: np.random.Generator, machine: str
) -> tuple[dict[str, Any], list[dict[str, Any]], pl.DataFrame | None]:
    values = row["values"]
    dense = row["kind"] == "control"
    steps = np.array(STEPS)
    even, centred = values.get("tree.mirror") == 1.0, values.get("tree.routing") == "centred"
    tree_sum = values.get("tree.placement") == "tree"
    end = 0.35 if centred else (1.1 if even else 1.9) - (0.3 if tree_sum else 0.0)
    path = np.interp(steps, [0, 60, 150, 300], [1.7, 2.6, (end + 1.7) / 2, end]) + rng.normal(0, 0.03)
    floor = {"dense_total": 1.98, "dense_active": 2.09}.get(row["arm"], 2.03 + 0.01 * tree_sum - 0.012 * centred)
    floor += offset + rng.normal(0, 0.004) + 0.03 * np.log10(row["lr"] / 3e-3) ** 2
    bpb = floor + (8.0 - floor) * np.exp(-steps / 45)
    if row["diverged"]:
        steps, bpb, path = steps[:5], np.r_[bpb[:4], np.nan], path[:5]
    balance: dict[str, Any] = {}
    frame = None
    per_step: dict[str, list[float]] = {}
    if not dense:
        frame, per_step, balance = _usage(row, steps, path, rng)
    common = {"study": name, "trial": row["trial"], "arm": row["arm"], "kind": row["kind"], "seed": row["seed"]}
    history = [
        {
            **common,
            "step": int(s),
            "tokens": int(s) * 2048,
            "bpb": float(b),
            "train_loss": None if s == 0 else float(b) * 2.2,
            "lr": row["lr"] * (1 - s / 330),
            **{k: v[i] for k, v in per_step.items()},
        }
        for i, (s, b) in enumerate(zip(steps, bpb, strict=True))
    ]
    units = 1276
    tree = {k.partition(".")[2]: v for k, v in values.items()}
    config = {"tree": tree, "train": {"lr": row["lr"]}, "init_seed": row["seed"]}
    trial = {
        **common,
        "status": "diverged" if row["diverged"] else "finished",
        "run_id": hashlib.md5(f"{name}{row['trial']}".encode()).hexdigest(),
        **{f"factor.{k}": values[k] for k in keys},
        "lr": row["lr"],
        "config": json.dumps(config),
        "bpb": None if row["diverged"] else float(bpb[-1]),
        "bpb_start": float(bpb[0]),
        "train_loss": float(bpb[-1]) * 2.2,
        **balance,
        "total_units": 40 if row["arm"] == "dense_active" else units,
        "active_units": units if row["arm"] == "dense_total" else 40,
        "active_frac": 40 / units,
        "total_params": 1_800_000,
        "active_params": 700_000,
        "flops_per_token": 2_400_000 if row["arm"] == "dense_total" else 1_500_000,
        "tokens": 300 * 2048,
        "seconds": 31.0 + float(rng.normal(0, 1)),
        "tokens_per_second": 19800.0,
        "git_commit": "30ec799" + "0" * 33,
        "git_dirty": False,
        "data_hash": "d" * 12,
        "tokenizer_hash": "e" * 12,
        "machine": machine,
        "threads": 2,
        "device": "cpu",
        "message": "loss is not finite at step 150" if row["diverged"] else "",
    }
    return trial, history, frame


def _usage(
    row: dict[str, Any], steps: np.ndarray, path: np.ndarray, rng: np.random.Generator
) -> tuple[pl.DataFrame, dict[str, list[float]], dict[str, Any]]:
    nodes = 2**DEPTH - 1
    tilt = rng.normal(0, 1, size=(1, LAYERS, TREES, nodes)) + 0.2 * rng.normal(
        0, 1, size=(len(steps), LAYERS, TREES, nodes)
    )
    right = 1 / (1 + np.exp(-path[:, None, None, None] * tilt))
    share = np.zeros((len(steps), LAYERS, TREES, 2 * nodes + 1))
    share[..., 0] = 1
    for n in range(nodes):
        share[..., 2 * n + 1] = share[..., n] * (1 - right[..., n])
        share[..., 2 * n + 2] = share[..., n] * right[..., n]
    leaf = share[..., nodes:]
    leaves = 2**DEPTH
    entropy = -(leaf * np.log(leaf)).sum(-1)
    n_eff = np.exp(entropy) / leaves
    dead = leaf < 0.01 / leaves
    lost = 1 - entropy / np.log(leaves)
    alive = ~dead[0]
    stayed = alive & dead[-1]
    revived = (dead[1:-1].any(0)) & alive & ~dead[-1] if len(steps) > 2 else np.zeros_like(alive)
    per_step = {
        "n_eff_frac": n_eff.mean((1, 2)).tolist(),
        "dead_frac": dead.mean((1, 2, 3)).tolist(),
        "bits_lost": lost.mean((1, 2)).tolist(),
        "flip_rate": [None, *np.clip(0.5 * np.exp(-steps[1:] / 90), 0.02, 1).tolist()],
        "flip_rate_worst": [None, *np.clip(0.6 * np.exp(-steps[1:] / 90), 0.03, 1).tolist()],
        "saturation": np.clip(1 - np.exp(-steps / 80), 0, 1).tolist(),
        "saturation_worst": np.clip(0.9 - np.exp(-steps / 80), -1, 1).tolist(),
    }
    balance = {
        "n_eff_frac": per_step["n_eff_frac"][-1],
        "n_eff_frac_worst": float(n_eff[-1].min()),
        "dead_frac": per_step["dead_frac"][-1],
        "dead_frac_worst": float(dead[-1].mean(-1).max()),
        "never_hit": float((leaf[-1] * TOKENS < 0.5).mean()),
        "max_vio": float((leaf[-1].max(-1) * leaves - 1).mean()),
        "gini": 0.5,
        "bits_lost": per_step["bits_lost"][-1],
        "bits_lost_worst": float(lost[-1].max()),
        "collapse": float((lost[-1].mean(-1) > 0.5).any()),
        "n_eff_frac_start": per_step["n_eff_frac"][0],
        "n_eff_frac_min": min(per_step["n_eff_frac"]),
        "dead_frac_start": per_step["dead_frac"][0],
        "dead_frac_max": max(per_step["dead_frac"]),
        "pruned_frac": float(stayed.mean()),
        "revived_frac": float(revived.mean()),
    }
    level = np.floor(np.log2(np.arange(2 * nodes + 1) + 1)).astype(int)
    index = np.arange(2 * nodes + 1) - (2**level - 1)
    t, l, k, h = np.meshgrid(
        np.arange(len(steps)), np.arange(LAYERS), np.arange(TREES), np.arange(2 * nodes + 1), indexing="ij"
    )
    inner = level[h] < DEPTH
    skew = np.where(inner, np.tanh(rng.normal(0.3, 0.2, size=h.shape)), np.nan)
    table = pl.DataFrame(
        {
            "trial": row["trial"],
            "arm": row["arm"],
            "seed": row["seed"],
            "step": steps[t].ravel(),
            "window": "held_out",
            "layer": l.ravel(),
            "tree": k.ravel(),
            "level": level[h].ravel(),
            "index": index[h].ravel(),
            "count": np.round(share[t, l, k, h] * TOKENS).astype(int).ravel(),
            "skew": skew.ravel(),
            "offset": np.where(inner, np.abs(rng.normal(0, 0.5, size=h.shape)), np.nan).ravel(),
            "in_norm": np.ones(h.size),
            "out_norm": np.ones(h.size),
        }
    ).with_columns(
        pl.lit(row["arm"]).alias("arm"),
        pl.col("skew", "offset", "in_norm", "out_norm").cast(pl.Float32).fill_nan(None),
        pl.col("step", "index").cast(pl.Int32),
        pl.col("layer", "tree").cast(pl.Int16),
        pl.col("level").cast(pl.Int8),
    )
    return table, per_step, balance
