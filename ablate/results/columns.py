"""Every column of the exported tables, with its type."""

from __future__ import annotations

import polars as pl

from ablate.balance.metrics import FLAGS, SUMMARY
from ablate.balance.usage import MOTION_SCHEMA, NORMS, TREES_SCHEMA, USAGE_SCHEMA
from ablate.config.endpoints import BPB, ENDPOINTS
from ablate.model.counts import Cost

COST = tuple(Cost.model_fields)

# Balance metrics with a mean over trees and layers and a worst tree.
WITH_WORST = tuple(SUMMARY)
BALANCE = tuple(name + end for name in WITH_WORST for end in ("", "_worst")) + FLAGS

# Columns of balance.usage.TREES_SCHEMA at the end of a trial, mean over layers and trees, with the tables' names.
TREE_MEANS = {
    "ceiling": "n_eff_ceiling",  # n_eff_frac that median thresholds would give on this data
    "informativeness": "informativeness",
    "informativeness_shuffled": "informativeness_shuffled",
    "flip_rate": "flip_rate",  # share of tokens whose leaf changed since the evaluation before the last
    "path_asymmetry": "path_asymmetry",
    "grad_skew": "grad_skew",
    "router_offset": "router_offset",
}

# Columns of TREES_SCHEMA that history.parquet has per evaluation, and which end of them is the worst tree.
ROUTING = {"flip_rate": "max", "saturation": "min"}

# Columns that tables published before they were added may lack; a reader fills them with nulls.
TASK = tuple(e.name for e in ENDPOINTS.values() if e.part == "task")  # of tasks other than language
STARTS = {name: ENDPOINTS[name].start for name in TASK}
LATER = frozenset({*NORMS, *TASK, *STARTS.values()})

# Prefix of a metric and a column each: qa/<task>/<shots>shot/<metric>, and /error, /chance and /unigram of it.
QA = "qa/"
FACTOR = "factor."  # prefix of one column (or parameter) a factor

_KEYS = {
    "study": pl.String(),
    "trial": pl.String(),  # hash of the configuration
    "arm": pl.String(),
    "kind": pl.String(),  # arm, control, tune or search
    "seed": pl.Int64(),
}

TRIALS_SCHEMA: dict[str, pl.DataType] = {
    **_KEYS,
    "status": pl.String(),  # finished, diverged or pruned
    "run_id": pl.String(),  # null where the tracking server was away when the trial ended
    "config": pl.String(),  # the whole Trial as JSON
    "lr": pl.Float64(),
    "lr_at_edge": pl.Boolean(),  # tuned and the best of its values was the smallest or largest; null where not tuned
    BPB.name: pl.Float64(),  # at the end; null where it diverged
    BPB.start: pl.Float64(),
    **{column: pl.Float64() for name, start in STARTS.items() for column in (name, start)},  # null for other tasks
    "train_loss": pl.Float64(),  # nats a token (squared error of a student), mean since the evaluation before the last
    # Balance at the end, on the held-out slice; null without a tree, and where the trial diverged.
    **{name: pl.Float64() for name in BALANCE},
    "n_eff_frac_start": pl.Float64(),
    "n_eff_frac_min": pl.Float64(),  # worst evaluation of the run
    "dead_frac_start": pl.Float64(),
    "dead_frac_max": pl.Float64(),  # worst evaluation of the run
    "leaves_dead_start": pl.Int64(),  # over all layers and trees
    "leaves_dead_end": pl.Int64(),
    "born_dead_frac": pl.Float64(),  # dead at step 0, share of all leaves
    "never_alive_frac": pl.Float64(),  # dead at every evaluation
    "pruned_frac": pl.Float64(),  # alive at step 0, died and stayed dead
    "revived_frac": pl.Float64(),  # alive at step 0, died and alive again at the end: transient collapse
    **{name: pl.Float64() for name in TREE_MEANS.values()},
    **{name: pl.Float64() if name == "active_frac" else pl.Int64() for name in COST},
    "tokens": pl.Int64(),  # training tokens seen
    "seconds": pl.Float64(),  # wall time of the trial's last attempt
    "tokens_per_second": pl.Float64(),
    "git_commit": pl.String(),
    "git_dirty": pl.Boolean(),
    "data_hash": pl.String(),
    "tokenizer_hash": pl.String(),
    "machine": pl.String(),
    "threads": pl.Int64(),
    "device": pl.String(),
    "route_table": pl.String(),
    "versions": pl.String(),  # JSON
    "message": pl.String(),
}
"""trials.parquet, one row a trial; one column `factor.<dotted>` more for each factor, typed as its values, and columns
`qa/…` where questions were asked."""

HISTORY_SCHEMA: dict[str, pl.DataType] = {
    **_KEYS,
    "step": pl.Int64(),
    "tokens": pl.Int64(),
    BPB.name: pl.Float64(),
    **{name: pl.Float64() for name in TASK},
    "train_loss": pl.Float64(),
    "lr": pl.Float64(),
    "train_seconds": pl.Float64(),
    **{name: pl.Float64() for name in BALANCE},
    # On the fixed probe tokens: share whose leaf changed since the evaluation before (null at the first), and agreement
    # with the last evaluation beyond chance (κ); null without a tree, and where all tokens sit on one leaf.
    **{name + end: pl.Float64() for name in ROUTING for end in ("", "_worst")},
}
"""history.parquet, one row an evaluation."""

_PLACE = {"study": pl.String(), "trial": pl.String(), "arm": pl.String(), "seed": pl.Int64()}
USAGE_TABLE_SCHEMA: dict[str, pl.DataType] = {**_PLACE, **USAGE_SCHEMA}
"""usage.parquet, one row a tree position, evaluation and trial."""
TREES_TABLE_SCHEMA: dict[str, pl.DataType] = {**_PLACE, **TREES_SCHEMA}
"""trees.parquet, one row a tree, evaluation and trial."""
MOTION_TABLE_SCHEMA: dict[str, pl.DataType] = {**_PLACE, **MOTION_SCHEMA}
"""motion.parquet, one row a node that probe tokens reached, evaluation and trial with train.motion."""

WINDOWS_TABLE_SCHEMA: dict[str, pl.DataType] = {
    "study": pl.String(),
    "arm": pl.String(),
    "kind": pl.String(),
    "window": pl.Int32(),
    "bytes": pl.Int32(),
    "bits": pl.Float64(),  # mean over the arm's finished trials
    "trials": pl.Int64(),
}
"""windows.parquet, one row an arm and window of the held-out slice at the last evaluation; trials that tune are left out.
Means over trials: a row a trial would be many times the other tables."""

RATES_SCHEMA: dict[str, pl.DataType] = {
    "study": pl.String(),
    "arm": pl.String(),
    "round": pl.Int64(),  # of the bracket: 0 the first three rates, then one more each, last the refinement; a grid has 0
    "lr": pl.Float64(),
    "trials": pl.Int64(),  # one a tuning seed
    "diverged": pl.Int64(),
    # Means over the tuning seeds; null where a trial diverged (bpb), or without a tree (balance).
    **{name: pl.Float64() for name in ENDPOINTS},
    "chosen": pl.Boolean(),
    "bound": pl.Boolean(),  # chosen as the smallest or largest rate tried: a bound, not an optimum
}
"""rates.parquet, one row a learning rate that an arm tried; only where rates were tuned."""

# How prune.parquet names what units were removed by: dead leaves, at random, or smallest weight norm first.
DEAD, RANDOM, MAGNITUDE = "dead", "random", "magnitude"
PRUNE_SCHEMA: dict[str, pl.DataType] = {
    **_KEYS,
    "run_id": pl.String(),
    "method": pl.String(),
    "threshold": pl.Float64(),  # share of a tree's tokens at or under which a subtree went; the others remove as many
    "removed_frac": pl.Float64(),  # of all units
    "bpb_before": pl.Float64(),  # on one kernel route with bpb_after
    "bpb_after": pl.Float64(),  # mean over draws where there are several
    "delta_bpb": pl.Float64(),
}
"""prune.parquet, one row a method, threshold and pruned trial; only where `ablate prune` was run."""
