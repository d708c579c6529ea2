"""Two studies side by side: does what one showed hold in the other?"""

from __future__ import annotations

from typing import Any

import numpy as np

from ablate.analysis import arms, contrasts
from ablate.analysis.contrasts import Estimate
from ablate.analysis.families import judged
from ablate.analysis.findings import compute
from ablate.analysis.frames import Tables
from ablate.analysis.verdicts import Runs
from ablate.config import ConfigError


def compare_tables(a: Tables, b: Tables) -> dict[str, Any]:
    """Shared arms (Welch, unpaired, as runs of two studies share nothing) and shared questions with both verdicts.

    Arms are shared where they have one label, questions where they name the same choice, reference and endpoint.

    Raises:
        ConfigError: one is a search, or the two have neither an arm nor a question in common.
    """
    for tables in (a, b):
        if tables.study.design == "search":
            raise ConfigError(
                f"study {tables.name!r} is a search: its candidates' names mean nothing elsewhere; "
                f"`ablate study promote {tables.name}` makes a study that can be compared"
            )
    first, second = compute(a), compute(b)
    labels_a, labels_b = ({r["label"]: r["arm"] for r in f["arms"]} for f in (first, second))
    shared = [label for label in labels_a if label in labels_b]
    endpoints = [e for e in judged(a.study) if e in judged(b.study)]
    runs_a, runs_b = Runs.of(arms.outcomes(a), endpoints), Runs.of(arms.outcomes(b), endpoints)
    rows: list[dict[str, Any]] = []
    for label in shared:
        for endpoint in endpoints:
            x = runs_a.values.get((labels_a[label], endpoint), {})
            y = runs_b.values.get((labels_b[label], endpoint), {})
            if x and y:
                rows.append(_row(label, endpoint, (labels_a[label], x, runs_a), (labels_b[label], y, runs_b)))
    tested = [r for r in rows if r["p"] is not None]
    for r, p in zip(tested, contrasts.benjamini_hochberg([r["p"] for r in tested]) if tested else [], strict=True):
        r["p_adjusted"] = float(p)
    questions = _questions(first, second)
    if not rows and not questions:
        raise ConfigError(
            f"studies {a.name!r} and {b.name!r} have no arm and no question in common: nothing to compare"
        )
    warnings = [
        f"{what} differ: {', '.join(sorted(here))} against {', '.join(sorted(there))}"
        for what, column in (("data sets", "data_hash"), ("tokenizers", "tokenizer_hash"), ("commits", "git_commit"))
        if (here := set(a.trials[column].drop_nulls())) != (there := set(b.trials[column].drop_nulls()))
    ]
    return {
        "schema": "ablate.comparison/1",
        "studies": [a.name, b.name],
        "inputs": [a.digests, b.digests],
        "warnings": warnings,
        "family_size": len(tested),
        "arms": rows,
        "questions": questions,
    }


def _row(label: str, endpoint: str, first: Any, second: Any) -> dict[str, Any]:
    (arm_a, x, runs_a), (arm_b, y, runs_b) = first, second
    e: Estimate | None = None
    if min(len(x), len(y)) >= 2:
        e = contrasts.welch(np.array(list(y.values())), np.array(list(x.values())))
    return {
        "label": label,
        "endpoint": endpoint,
        "means": [float(np.mean(list(x.values()))), float(np.mean(list(y.values())))],
        "n": [len(x), len(y)],
        "effect": float(e.effect) if e else None,
        "interval": [float(e.low), float(e.high)] if e else None,
        "p": float(e.p) if e else None,
        "p_adjusted": None,
        "run_ids": [[runs_a.run_ids[arm_a, s] for s in x], [runs_b.run_ids[arm_b, s] for s in y]],
    }


def _questions(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    def key(f: dict[str, Any]) -> tuple[str, str, str]:
        return f["arm_label"], f["reference_label"], f["endpoint"]

    other = {key(f): f for f in second["findings"]}
    out = []
    for f in first["findings"]:
        g = other.get(key(f))
        if g is None:
            continue
        opposite = {f["verdict"], g["verdict"]} == {"supported", "refuted"} and f["claim"] == g["claim"]
        signs = f["effect"] is not None and g["effect"] is not None and f["effect"] * g["effect"] < 0
        contradicts = opposite or (f["verdict"] == g["verdict"] == "supported" and f["claim"] != "matches" and signs)
        agrees = not contradicts and f["verdict"] == g["verdict"]
        out.append(
            {
                "choice": f["arm_label"],
                "against": f["reference_label"],
                "endpoint": f["endpoint"],
                "verdicts": [f["verdict"], g["verdict"]],
                "effects": [f["effect"], g["effect"]],
                "intervals": [f["interval"], g["interval"]],
                "n": [f["n"], g["n"]],
                "outcome": "contradicted" if contradicts else "the same" if agrees else "open",
            }
        )
    return out
