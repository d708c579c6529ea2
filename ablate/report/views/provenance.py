"""Provenance: where every number comes from, and the command that repeats it."""

from __future__ import annotations

import json
from typing import Any

import polars as pl

from ablate.analysis.arms import level_text
from ablate.config.endpoints import Endpoint
from ablate.report.context import Context
from ablate.report.explorer import explorer
from ablate.report.parallel import parallel
from ablate.report.parts import Column, Table, View
from ablate.report.tables import RUNS, cells, columns
from ablate.report.wording import short
from ablate.results.columns import FACTOR


def provenance(c: Context) -> View:
    """Show commits, hashes, machines, plan, deviations, exclusions, and every run with the command that repeats it."""
    view = View("runs", "Provenance and runs", "Where does every number come from, and which command makes it again?")
    findings, factors = c.findings, c.tables.factors
    view.tables.append(_shared(c))
    view.reading = [f"Plan: {n}" for n in findings["plan_notes"]]
    view.reading += [f"Deviation: {d}" for d in findings["deviations"]] or ["No deviation from the plan."]
    if findings["exclusions"]:
        view.tables.append(_exclusions(c))
    else:
        view.reading.append("Every run finished; none is excluded.")
    rows = [_run(c, r, factors) for r in c.tables.trials.iter_rows(named=True)]
    view.tables.append(Table("runs", "Every run", _run_columns(c.quality, factors), rows, limit=100))
    if c.findings["design"] != "search":  # whose own section draws candidates, not runs
        parallel(c, view, rows, factors)
    view.widgets.append(("runs", explorer(c, rows, factors)))
    view.reading += limitations(c)
    return view


def _shared(c: Context) -> Table:
    """What the runs share: code, data, machine, versions, plan, hashes of the tables."""
    trials, findings = c.tables.trials, c.findings
    facts = [
        ("commit", _distinct(trials["git_commit"])),
        ("uncommitted changes", _dirty(trials)),
        ("data", _distinct(trials["data_hash"])),
        ("tokenizer", _distinct(trials["tokenizer_hash"])),
        ("machine", _distinct(trials["machine"])),
        ("device", _distinct(trials["device"])),
        ("threads", _distinct(trials["threads"].cast(pl.Int64).cast(pl.String))),
        ("kernels' route table", _distinct(trials["route_table"])),
        ("versions", "; ".join(_versions(trials)) or "–"),
        ("plan", findings["plan_hash"] or "–"),
        *((f"table {k}", v) for k, v in findings["inputs"].items()),
    ]
    rows = [{"what": k, "value": v} for k, v in facts]
    return Table("provenance", "What the runs share", cells(what="what", value="value"), rows)


def _exclusions(c: Context) -> Table:
    head = columns(seed=("seed", "d"), status="status", reason="what became of it", message="message", n=None)
    rows = [{**e, "arm": c.labels.get(e["arm"], e["arm"]), "runs": [e["run_id"]]} for e in c.findings["exclusions"]]
    return Table("exclusions", "Runs that did not finish", head, rows)


def _run(c: Context, r: dict[str, Any], factors: list[str]) -> dict[str, Any]:
    measured = ("lr", c.quality.name, "n_eff_frac", "dead_frac", "seconds")
    return {
        **{key: r[key] for key in ("trial", "kind", "seed", "status", *measured)},
        **{f: level_text(r[FACTOR + f]) for f in factors},
        "arm": c.labels.get(r["arm"], r["arm"]),
        "again": f"ablate reproduce {r['trial']}",
        "runs": [r["run_id"]],
    }


def _run_columns(of: Endpoint, factors: list[str]) -> list[Column]:
    return [
        *cells(trial="trial", arm="arm", kind="kind", seed=("seed", "d"), status="status"),
        *(Column(f, short(f)) for f in factors),
        *cells(lr=("lr", ".3g"), **{of.name: (of.short, of.form)}, n_eff_frac=("n_eff_frac", ".3f")),
        *cells(dead_frac=("dead_frac", ".3f"), seconds=("seconds", ",.0f"), again="makes it again"),
        RUNS,
    ]


def _distinct(values: pl.Series) -> str:
    seen = values.drop_nulls().unique().sort().to_list()
    return (
        ", ".join(str(v) for v in seen[:4]) + (f" and {len(seen) - 4} more" if len(seen) > 4 else "") if seen else "–"
    )


def _dirty(trials: pl.DataFrame) -> str:
    known = trials["git_dirty"].drop_nulls()
    return "–" if known.is_empty() else f"{int(known.sum())} of {len(known)} runs"


def _versions(trials: pl.DataFrame) -> list[str]:
    merged: dict[str, set[str]] = {}
    for text in trials["versions"].drop_nulls().unique().sort().to_list():
        try:
            data = json.loads(text)
        except json.JSONDecodeError:
            continue
        for k, v in data.items() if isinstance(data, dict) else ():
            merged.setdefault(str(k), set()).add(str(v))
    return [f"{k} {' or '.join(sorted(v))}" for k, v in sorted(merged.items())]


def limitations(c: Context) -> list[str]:
    """Return what a careful reader must keep in mind, from the study itself."""
    f = c.findings
    out = []
    if f["design"] != "confirm":
        out.append("Limitation: exploratory design; its findings are candidates for a `confirm` study.")
    n = min((a["n"] for a in f["arms"] if a["n"]), default=0)
    if n < 8 and f["design"] != "search":
        out.append(
            f"Limitation: {n} seeds an arm; eight paired seeds are the least for an exact test under .05 after adjustment."
        )
    if not f["assay"]:
        out.append(
            "Limitation: no dense controls of active and total size, so it is not known how much this task can tell."
        )
    if not f["learning_rates"] and "train.lr" not in c.tables.study.factors:
        out.append("Limitation: one learning rate for all arms.")
    models = {a["total_params"] for a in f["arms"] if a["total_params"] is not None}
    if models:
        size = f"{min(models):,.0f}" if len(models) == 1 else f"{min(models):,.0f} to {max(models):,.0f}"
        out.append(f"Limitation: models of {size} parameters; nothing here shows that it holds at other sizes.")
    return out
