"""Views of trust: seeds and power, and where every number comes from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import polars as pl

from ablate.analysis.arms import level_text
from ablate.analysis.frames import FACTOR
from ablate.report.context import Context
from ablate.report.draw import few_ticks, mark, wrap
from ablate.report.parts import Column, Table, View
from ablate.report.style import INK, MUTED, PAPER, RUNS_AS_LINES, new

DOTS = 24  # arms in the seed panel
EXPLORED = 5000  # runs that the page's explorer holds


def power(c: Context) -> View:
    """Seeds as dots, probability of collapse, what the design could have seen, the A/A test."""
    view = View("power", "Seeds and power", "How noisy is this, and what size of effect could it have missed?")
    frame = c.outcomes.filter(pl.col("bpb").is_not_null() & (pl.col("status") == "finished"))
    if frame.is_empty():
        view.missing = f"No finished run: run `ablate study run studies/{c.tables.name}.yaml`."
        return view
    present = set(frame["arm"])
    arms = [a for a in c.order if a in present]
    arms = arms if len(arms) <= DOTS else [a for a in arms if a in c.shown or c.kinds[a] == "control"]
    figure = new(7.6, 0.27 * len(arms) + 1.2)
    many = frame.height > RUNS_AS_LINES
    left, right = figure.subplots(1, 2, sharey=True)
    for i, arm in enumerate(arms[::-1]):
        rows = frame.filter(pl.col("arm") == arm).sort("seed")
        for ax, key in ((left, "bpb"), (right, "n_eff_frac")):
            x = rows[key].drop_nulls().to_list()
            look = {"markersize": 5, "alpha": 0.3 if many else 0.85, "rasterized": many}
            ax.plot(x, [i] * len(x), linestyle="none", **look, **mark(c.styles.arms[arm]))
            if x:
                ax.plot([np.mean(x)] * 2, [i - 0.3, i + 0.3], color=MUTED, linewidth=1.4)
    left.set_yticks(range(len(arms)), [wrap(c.labels[a], 40) for a in arms[::-1]])
    left.set_xlabel("bits per byte")
    right.set_xlabel("effective leaves / L")
    few_ticks(left, right)
    view.figures.append(("seeds", "Every seed a dot, bars are means", figure))
    view.data["seeds"] = frame.select("arm", "seed", "trial", "run_id", "bpb", "n_eff_frac").sort("arm", "seed")
    for p in c.findings["power"]:
        need = f"{p['seeds_for_margin']} paired seeds" if p["seeds_for_margin"] else "over 100 paired seeds"
        view.reading.append(
            f"{p['endpoint']}: paired sd {p['paired_sd']:.4g}; {p['n']} seeds find {p['detectable']:.4g} with 80% power, the margin "
            f"of {p['margin']:g} needs {need}. An exact sign-flip p cannot be under {p['smallest_sign_flip_p']:.3g} here."
        )
    _collapse(c, view)
    twins = c.findings["twins"]
    if twins:
        rows_out = [
            {
                "a": c.labels.get(t["arms"][0], t["arms"][0]),
                "b": c.labels.get(t["arms"][1], t["arms"][1]),
                "endpoint": t["endpoint"],
                "effect": t["effect"],
                "low": t["interval"][0],
                "high": t["interval"][1],
                "p": t["p"],
                "n": t["n"],
                "runs": t["run_ids"],
            }
            for t in twins
        ]
        columns = [
            Column("a", "arm"),
            Column("b", "the same model as"),
            Column("endpoint", "endpoint"),
            Column("effect", "difference", "+.5f"),
            Column("low", "95% from", "+.5f"),
            Column("high", "to", "+.5f"),
            Column("p", "p", ".3g"),
            Column("n", "n", "d"),
            Column("runs", "runs", "runs"),
        ]
        view.tables.append(Table("twins", "A/A test: arms that are one model by construction", columns, rows_out))
        odd = sum(t["p"] < 0.05 for t in twins)
        view.reading.append(
            f"A/A test: {odd} of {len(twins)} comparisons of identical models have p < .05 (about 5% are expected)."
        )
    spreads = c.findings["collapse"]["brown_forsythe"]
    for endpoint, p in spreads.items():
        if p is not None:
            equal = "differs between arms" if p < 0.05 else "shows no difference between arms"
            view.reading.append(f"Spread of {endpoint} over seeds {equal} (Brown-Forsythe p {p:.2g}).")
    return view


def _collapse(c: Context, view: View) -> None:
    rows = c.findings["collapse"]["arms"]
    if not rows:
        return
    table = [
        {
            "arm": c.labels.get(r["arm"], r["arm"]),
            "collapsed": f"{r['collapsed']} of {r['n']}",
            "probability": r["probability"],
            "low": r["interval"][0],
            "high": r["interval"][1],
            "separation": r["separation"],
            "remark": r["modes"],
            "runs": r["run_ids"],
        }
        for r in rows
    ]
    columns = [
        Column("arm", "arm"),
        Column("collapsed", "collapsed"),
        Column("probability", "P(collapse)", ".2f"),
        Column("low", "95% from", ".2f"),
        Column("high", "to", ".2f"),
        Column("separation", "separation", ".2f", "Ashman's D of collapsed against other runs; over 2: two modes"),
        Column("remark", "remark"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(
        Table("collapse", "Collapse (bits_lost over 0.5 in any layer), Wilson intervals", columns, table)
    )
    hit = sum(r["collapsed"] > 0 for r in rows)
    view.reading.append(f"{hit} of {len(rows)} arms had a collapsed run.")


def provenance(c: Context) -> View:
    """Commits, hashes, machines, plan, deviations, exclusions, and every run with the command that repeats it."""
    view = View("runs", "Provenance and runs", "Where does every number come from, and how is it made again?")
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
    view.tables.append(
        Table(
            "provenance",
            "What the runs share",
            [Column("what", "what"), Column("value", "value")],
            [{"what": k, "value": v} for k, v in facts],
        )
    )
    view.reading = [f"Plan: {n}" for n in findings["plan_notes"]]
    view.reading += [f"Deviation: {d}" for d in findings["deviations"]] or ["No deviation from the plan."]
    if findings["exclusions"]:
        columns = [
            Column("arm", "arm"),
            Column("seed", "seed", "d"),
            Column("status", "status"),
            Column("reason", "what became of it"),
            Column("message", "message"),
            Column("runs", "runs", "runs"),
        ]
        rows = [{**e, "arm": c.labels.get(e["arm"], e["arm"]), "runs": [e["run_id"]]} for e in findings["exclusions"]]
        view.tables.append(Table("exclusions", "Runs that did not finish", columns, rows))
    else:
        view.reading.append("Every run finished; none is excluded.")
    factors = c.tables.factors
    rows = [
        {
            "trial": r["trial"],
            "arm": c.labels.get(r["arm"], r["arm"]),
            "kind": r["kind"],
            "seed": r["seed"],
            "status": r["status"],
            **{f: level_text(r[FACTOR + f]) for f in factors},
            "lr": r["lr"],
            "bpb": r["bpb"],
            "n_eff_frac": r["n_eff_frac"],
            "dead_frac": r["dead_frac"],
            "seconds": r["seconds"],
            "again": f"ablate reproduce {r['trial']}",
            "runs": [r["run_id"]],
        }
        for r in trials.iter_rows(named=True)
    ]
    columns = [
        Column("trial", "trial"),
        Column("arm", "arm"),
        Column("kind", "kind"),
        Column("seed", "seed", "d"),
        Column("status", "status"),
        *(Column(f, f.partition(".")[2].replace("_", " ")) for f in factors),
        Column("lr", "lr", ".3g"),
        Column("bpb", "bpb", ".4f"),
        Column("n_eff_frac", "n_eff_frac", ".3f"),
        Column("dead_frac", "dead_frac", ".3f"),
        Column("seconds", "seconds", ",.0f"),
        Column("again", "makes it again"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(Table("runs", "Every run", columns, rows, limit=100))
    _parallel(c, view, rows, factors)
    view.widgets.append(("runs", explorer(c, rows, factors)))
    view.reading += limitations(c)
    return view


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
    """What a careful reader must keep in mind, from the study itself."""
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
    if not f["learning_rates"]:
        out.append("Limitation: one learning rate for all arms.")
    models = {a["total_params"] for a in f["arms"] if a["total_params"] is not None}
    if models:
        size = f"{min(models):,.0f}" if len(models) == 1 else f"{min(models):,.0f} to {max(models):,.0f}"
        out.append(f"Limitation: models of {size} parameters; nothing here shows that it holds at other sizes.")
    return out


def _parallel(c: Context, view: View, rows: list[dict[str, Any]], factors: list[str]) -> None:
    """Parallel coordinates of factors, bpb and balance; a line a finished run (an even choice of 600 where there are
    more).
    """
    runs = [
        r
        for r in rows
        if r["status"] == "finished" and r["kind"] != "tune" and r["bpb"] is not None and r["n_eff_frac"] is not None
    ]
    if len(runs) < 2 or not factors:
        return
    if len(runs) > 600:
        runs = [runs[i] for i in np.linspace(0, len(runs) - 1, 600).round().astype(int)]
    keys = [*factors[:7], "dead_frac", "n_eff_frac", "bpb"]
    figure = new(7.6, 3.6)
    ax = figure.subplots()
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
    places: dict[str, list[float]] = {}
    ends: dict[str, tuple[str, str]] = {}
    for k in keys:
        if k in factors:
            texts = [r[k] for r in runs]
            names = sorted(set(texts), key=_numeric)
            places[k] = [names.index(t) / max(1, len(names) - 1) for t in texts]
            ends[k] = ("", "")
            if len(names) <= 6:
                for i, name in enumerate(names):
                    ax.text(
                        keys.index(k) + 0.04,
                        i / max(1, len(names) - 1),
                        wrap(name, 10, 1),
                        fontsize=7,
                        color=INK,
                        va="center",
                        zorder=4,
                        bbox=box,
                    )
            else:
                ends[k] = (names[0], names[-1])
        else:
            values = np.array([np.nan if r[k] is None else r[k] for r in runs], dtype=float)
            low, high = float(np.nanmin(values)), float(np.nanmax(values))
            places[k] = ((values - low) / max(high - low, 1e-12)).tolist()
            ends[k] = (f"{low:.3f}", f"{high:.3f}")
    styles = {c.labels[a]: s for a, s in c.styles.arms.items()}
    rng = np.random.default_rng(0)  # spreads runs of one level apart, for the eye only
    jitter = rng.uniform(-0.02, 0.02, size=(len(runs), len(keys)))
    for i, r in enumerate(runs):
        y = [places[k][i] + (jitter[i, j] if k in factors else 0) for j, k in enumerate(keys)]
        style = styles.get(r["arm"])
        ax.plot(
            range(len(keys)),
            y,
            color=style.colour if style else MUTED,
            linewidth=0.8,
            rasterized=len(runs) > RUNS_AS_LINES,
            alpha=max(0.12, min(0.7, 40 / len(runs))),
        )
    for j, k in enumerate(keys):
        ax.axvline(j, color=MUTED, linewidth=0.9)
        ax.text(j, -0.06, ends[k][0], ha="center", va="top", fontsize=7, color=MUTED)
        ax.text(j, 1.05, ends[k][1], ha="center", va="bottom", fontsize=7, color=MUTED)
    ax.set_xticks(
        range(len(keys)), [wrap(k.partition(".")[2].replace("_", " ") if k in factors else k, 12) for k in keys]
    )
    ax.set_yticks([])
    ax.set_ylim(-0.14, 1.14)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    view.figures.append(
        ("parallel", "Every finished run across its settings and outcomes, coloured as its arm", figure)
    )


def _numeric(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def explorer(c: Context, rows: list[dict[str, Any]], factors: list[str]) -> dict[str, Any]:
    """Runs by column for the page's explorer, with the settings that differ between any two of them."""
    kept = rows[:EXPLORED]
    settings = _varying(c.tables.trials["config"].to_list()[:EXPLORED])
    columns = ["trial", "arm", "kind", "seed", "status", "bpb", "n_eff_frac", "dead_frac"]
    return {
        "columns": {k: [r[k] for r in kept] for k in columns},
        "runs": [r["runs"][0] for r in kept],
        "settings": settings,
        "address": c.address or "",
        "total": len(rows),
        "factors": factors,
    }


def _varying(configs: list[str | None]) -> dict[str, list[str]]:
    """Flattened settings whose value differs between trials, as text."""
    flat = [_flatten(json.loads(t)) if t else {} for t in configs]
    keys = sorted({k for f in flat for k in f})
    out = {}
    for k in keys:
        values = [level_text(f.get(k)) for f in flat]
        if len(set(values)) > 1:
            out[k] = values
    return out


def _flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data if isinstance(data, (bool, int, float, str)) or data is None else str(data)}
    out: dict[str, Any] = {}
    for k, v in data.items():
        out |= _flatten(v, f"{prefix}.{k}" if prefix else str(k))
    return out
