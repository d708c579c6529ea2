"""A study as large as one likes whose trials have all ended, as a real one leaves it: plan, sealed records of twelve kilobytes,
tables of leaf usage, trees and windows beside them, and rows in Optuna's database."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from pydantic_core import to_json
from sqlalchemy import text

from ablate.balance import metrics, usage
from ablate.config import Study, parse
from ablate.results.layout import TREES, USAGE, WINDOWS, Layout
from ablate.results.record import Record, leaf_deaths, tree_means
from ablate.results.seal import digest_of, sealed
from ablate.study.address import default_storage
from ablate.study.designs import PlannedTrial, expand
from ablate.study.queue import Queue
from ablate.study.records import save_plan
from ablate.study.storage import open_storage
from ablate.training.result import Evaluation
from tests.study import objective

NAME = "grown"
ARMS = 20
STEPS = (0, 200, 400)
LAYERS, TREES_A_LAYER, LEAVES, TOKENS, WINDOW_COUNT = 2, 4, 64, 65536, 512
_TRIAL = "INSERT INTO trials (trial_id, number, study_id, state) VALUES (:id, :id - 1, :study, 'COMPLETE')"
_ATTRIBUTE = "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (:id, 'trial', :hash)"


def grow(root: Path, seeds: int) -> int:
    """Write a finished study `grown` of 20 arms under `root`, as its file says; returns how many trials it has."""
    settings = {
        "name": NAME,
        "title": "A grown study",
        "base": {
            "model": {"context": 128, "blocks": LAYERS},
            "train": {"steps": STEPS[-1], "batch_size": 4, "lr": 0.004, "eval_every": 200, "eval_tokens": TOKENS},
        },
        "factors": {
            "tree.mirror": [-0.5, 0, 0.25, 0.5, 1],
            "tree.placement": ["unit", "tree"],
            "tree.routing": ["sign", "centred"],
        },
        "seeds": list(range(seeds)),
    }
    (root / "studies").mkdir(parents=True, exist_ok=True)
    (root / "studies" / f"{NAME}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    plan, layout = expand(parse(Study, settings)), Layout(root, NAME)
    save_plan(layout, plan)
    rng = np.random.default_rng(0)
    models: dict[str, dict[str, Any]] = {}
    for planned in plan.trials:
        if planned.arm not in models:
            models[planned.arm] = _model(planned, plan.space, root / "made" / str(len(models)), rng)
        _write(layout, planned, models[planned.arm], root / "made" / str(list(models).index(planned.arm)), rng)
    queue = Queue(plan, open_storage(default_storage(root)))
    rows = [
        {"id": number + 1, "study": queue.study._study_id, "hash": json.dumps(planned.hash)}
        for number, planned in enumerate(plan.trials)
    ]
    with queue.storage.engine.begin() as connection:
        connection.execute(text(_TRIAL), rows)
        connection.execute(text(_ATTRIBUTE), rows)
    return len(plan.trials)


def _write(layout: Layout, planned: PlannedTrial, model: dict[str, Any], made: Path, rng: np.random.Generator) -> None:
    """Write one trial's record, an arm's with small differences of its own, and link the arm's tables beside it."""
    off = 1 + rng.normal(0, 0.004)
    history = [
        {**e, "bpb": e["bpb"] * off, "balance": {k: v * off for k, v in e["balance"].items()}} for e in model["history"]
    ]
    run = hashlib.md5(planned.hash.encode()).hexdigest()
    config = {**model["config"], "init_seed": planned.trial.init_seed, "data_seed": planned.trial.data_seed}
    own = {"history": history, "trial": planned.hash, "seed": planned.seed, "run_id": run, "config": config}
    layout.record(planned.hash).write_text(sealed(to_json({**model, **own}, indent=1).decode()))
    for name, path in layout.side_tables(planned.hash).items():
        if (made / name).exists():
            os.link(made / name, path)


def _model(planned: PlannedTrial, space: str, made: Path, rng: np.random.Generator) -> dict[str, Any]:
    """The record of an arm's trial as plain data; its tables are written to the folder `made`."""
    made.mkdir(parents=True)
    spread = 1.5 - abs(planned.trial.tree.mirror - 0.4)
    tilt = rng.normal(size=(LAYERS, TREES_A_LAYER, LEAVES))
    parts, trees, history = [], [], []
    for place, step in enumerate(STEPS):
        share = np.exp(spread * tilt * (1 + 0.2 * place))
        counts = np.round(TOKENS * share / share.sum(-1, keepdims=True)).astype(int)
        nodes, norms = rng.normal(size=(*counts.shape[:2], LEAVES - 1)), np.ones((*counts.shape[:2], 2 * LEAVES - 1))
        shown: dict[str, Any] = {"in_norm": norms + rng.normal(0, 0.1, norms.shape), "out_norm": norms}
        parts.append(usage.rows(step, "held_out", counts, skew=np.tanh(nodes), offset=abs(nodes), **shown))
        if place:
            parts.append(usage.rows(step, "train", counts, **shown))
        measured = {name: rng.uniform(0.1, 0.9, counts.shape[:2]) for name in list(usage.TREES_SCHEMA)[3:]}
        trees.append(usage.tree_rows(step, measured))
        history.append(
            Evaluation(
                step=step,
                tokens=step * 512,
                bpb=2.0 + 0.1 * spread + 6.0 * np.exp(-step / 80),
                train_loss=4.0 if place else None,
                lr=0.004,
                seconds=step / 10,
                balance=metrics.summary(counts) | _probed(rng),
            )
        )
    pl.concat(parts).write_parquet(made / USAGE)
    pl.concat(trees).write_parquet(made / TREES)
    windows = {
        "window": pl.Series(range(WINDOW_COUNT), dtype=pl.Int32),
        "bytes": pl.Series(rng.integers(280, 320, WINDOW_COUNT), dtype=pl.Int32),
        "bits": pl.Series(rng.normal(1100, 60, WINDOW_COUNT), dtype=pl.Float32),
    }
    pl.DataFrame(windows).write_parquet(made / WINDOWS)
    origin = objective.PROVENANCE.model_copy(update={"versions": dict.fromkeys(("torch", "numba", "numpy"), "1.0.0")})
    return Record(
        config=planned.trial,
        status="finished",
        history=history,
        cost=objective.COST,
        provenance=origin,
        tokens_per_second=5000.0,
        seconds=45.0,
        study=NAME,
        space=space,
        trial=planned.hash,
        arm=planned.arm,
        kind=planned.kind,
        seed=planned.seed,
        factors=dict(planned.factors),
        run_id=None,
        leaves=leaf_deaths(made / USAGE),
        trees=tree_means(made / TREES),
        digests={name: digest_of(made / name) for name in (USAGE, TREES, WINDOWS)},
    ).model_dump(mode="json")


def _probed(rng: np.random.Generator) -> dict[str, float]:
    """What the probe adds to an evaluation's balance: names that the tables do not have."""
    names = ("informativeness", "informativeness_shuffled", "path_asymmetry", "router_offset")
    ends = ("", "_worst", *(f"layer{i}" for i in range(LAYERS)))
    return {f"{e}/{n}" if e.startswith("layer") else n + e: float(rng.uniform()) for n in names for e in ends}
