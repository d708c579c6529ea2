"""Verdicts: every comparison with its effect, interval, adjusted p, n and verdict."""

from __future__ import annotations

from typing import Any

import numpy as np

from ablate.analysis.families import judged
from ablate.analysis.rates import RULES
from ablate.config.endpoints import Endpoint, label_of
from ablate.report.answer import counts
from ablate.report.context import Context
from ablate.report.draw import rows_above, versus, zero
from ablate.report.parts import Table, View
from ablate.report.style import GRID, NARROW, VERDICT_COLOUR, VERDICT_MARK, new
from ablate.report.tables import cells
from ablate.report.wording import cap, many

TEXT = ("over text ±", ".4f", "95% half width over the windows of the held-out text, the arms as they are")
FOREST = 14  # rows an endpoint has in the forest plot


def verdicts(c: Context) -> View:
    """Show every comparison with its effect, interval, adjusted p, n and verdict."""
    view = View("verdicts", "Verdicts", "What does this study show, what does it rule out, and what can it not tell?")
    found = c.findings["findings"]
    if not found:
        view.missing = (
            "No comparison could be made: give the study a reference arm or controls and two seeds or more, then run "
            f"`ablate study run studies/{c.tables.name}.yaml`."
        )
        return view
    view.reading = _summary(c)
    main = [f for f in found if f["family"] != "dense"] or found
    rows = [_row(f) for f in sorted(found, key=_importance)]
    head = cells(
        choice="choice",
        against="against",
        endpoint="endpoint",
        verdict="verdict",
        effect=(
            "effect",
            "+.4f",
            "what the verdict rests on: typical difference (pseudomedian) of bpb from 8 pairs on, else the mean",
        ),
        low=("95% from", "+.4f"),
        high=("to", "+.4f"),
        mean=("mean", "+.4f", "of the paired differences"),
        median=("median", "+.4f"),
        trimmed_mean=("trimmed mean", "+.4f", "without a fifth of the differences at each end"),
        p_adjusted=(
            "adjusted p",
            ".3g",
            "adjusted over the family: Holm for named claims, Benjamini-Hochberg elsewhere",
        ),
        p_sign_flip=("sign-flip p", ".3g", "exact, unadjusted"),
        detectable=("detectable", ".3g", "smallest effect this comparison finds with 80% power"),
        n=("n", "d"),
        claim="claim",
        **({"text": TEXT} if any("over_text" in f for f in found) else {}),
        rates=("rates", "text", "learning rates of the two arms, and the rule that they follow"),
        remark="remark",
        family="family",
        runs=("runs", "runs"),
    )
    view.tables.append(Table("verdicts", "All comparisons, supported first", head, rows))
    for endpoint in judged(c.tables.study):
        shown = sorted((f for f in main if f["endpoint"] == endpoint and f["effect"] is not None), key=_importance)
        if shown:
            forest(view, endpoint, shown)
    return view


def _importance(f: dict[str, Any]) -> tuple[Any, ...]:
    rank = {"supported": 0, "refuted": 1, "inconclusive": 2}[f["verdict"]]
    first = {"confirm": 0, "bits": 0, "cost": 0, "factors": 1, "arms": 2, "dense": 3}.get(f["family"], 4)
    return first > 0, rank, first, -abs(f["effect"] or 0.0) / f["margin"], f["id"]


def _row(f: dict[str, Any]) -> dict[str, Any]:
    remarks = [*f["reasons"], *f["notes"], *([_outlying(f)] if f["outlying"] else [])]
    if f["below_margin"]:
        remarks.insert(0, f"real, but within the margin of {f['margin']:.3g}")
    kept = f.get("finished_only")
    if kept:
        value = "untestable" if kept["effect"] is None else f"{kept['effect']:+.4f}"
        remarks.append(f"a run diverged; finished runs alone: {value} (n {kept['n']})")
    low, high = f["interval"] or (None, None)
    return {
        "choice": f["arm_label"],
        "against": f["reference_label"],
        "endpoint": f["endpoint"],
        "claim": f"{f['claim']} (margin {f['margin']:.3g})",
        "effect": f["effect"],
        "low": low,
        "high": high,
        "mean": f["mean"],
        "median": f["median"],
        "trimmed_mean": f["trimmed_mean"],
        "p_adjusted": f["p_adjusted"],
        "p_sign_flip": f["p_sign_flip"],
        "detectable": f["detectable"],
        "n": f["n"],
        "verdict": f["verdict"],
        "text": (f["over_text"]["interval"][1] - f["effect"]) if "over_text" in f else None,
        "rates": _rates(f["rates"]),
        "remark": "; ".join(remarks),
        "family": f["family"],
        "runs": f["run_ids"],
    }


def _outlying(f: dict[str, Any]) -> str:
    """Name the outlying runs of a comparison and say what is left without their seeds."""
    runs = ", ".join(f"{r['arm']} {r['seed']}" for r in f["outlying"])
    left = f["without_outlying"]
    value = "untestable"
    if left["effect"] is not None:
        value = f"{left['effect']:+.4f} ({left['interval'][0]:+.4f} to {left['interval'][1]:+.4f})"
    return f"outlying: {runs}; without: {value}, n {left['n']}"


def _rates(f: dict[str, Any]) -> str:
    """Return the learning rates that a finding rests on: `own: 0.006, 0.003`, `one: 0.003`."""
    word = {"none": "one", "grid": "best of a list", "bracket": "own best"}.get(f["rule"], f["rule"])
    known = [f"{f[side]:.3g}" for side in ("arm", "reference") if f.get(side) is not None]
    bound = " (a bound)" if f.get("bound") else ""
    return f"{word}: {', '.join(dict.fromkeys(known))}{bound}" if known else word


def _summary(c: Context) -> list[str]:
    out = []
    found = c.findings["findings"]
    for family in c.findings["families"]:
        own = [f for f in [*found, *c.findings["recovered"], *c.findings["pruning"]] if f["family"] == family["family"]]
        method = {"holm": "Holm", "bh": "Benjamini-Hochberg"}[family["adjustment"]]
        out.append(f"{cap(family['what'])}: {counts(own)} ({many(family['size'], 'test')} in the family, {method}).")
    out.append(f"These verdicts rest on: {RULES[c.findings['rate_rule']]}.")
    over = [f["over_text"] for f in found if "over_text" in f]
    if over:
        out.append(
            f"Intervals are over seeds, on one held-out text. What {over[0]['windows']} other windows of the same source might "
            'show is the column "over text".'
        )
    if c.findings["design"] != "confirm":
        out.append(
            "This is an exploratory study: it finds candidates. Only a `confirm` study with named contrasts makes claims."
        )
    strongest = sorted((f for f in found if f["verdict"] == "supported" and f["family"] != "dense"), key=_importance)[
        :3
    ]
    out += [f["text"] for f in strongest]
    gap = c.findings["assay"]
    if gap:
        out.append(gate(gap, c.quality))
    return out


def gate(gap: dict[str, Any], of: Endpoint) -> str:
    """Return a sentence on whether this task may compare trees with dense layers."""
    spread = (
        f" (95% interval {gap['interval'][0]:{of.form}} to {gap['interval'][1]:{of.form}})" if gap["interval"] else ""
    )
    can = (
        "passed, so trees are compared with dense layers"
        if gap["sensitive"]
        else "failed, so no verdict is given on trees against dense layers"
    )
    return (
        f"The gate: dense layers of active and of total size are {gap['gap']:{of.form}} {of.short} apart{spread}, "
        f"{gap['margins']:.1f} margins; at least {gap['needed']:g} are needed over the whole interval: {can}."
    )


def forest(view: View, endpoint: str, shown: list[dict[str, Any]]) -> None:
    """Add the picture of differences in an endpoint with their intervals, the first of `shown` on top."""
    rows = shown[:FOREST][::-1]
    figure = new(NARROW, 0.42 * len(rows) + 1.4)
    ax = figure.subplots()
    margin = rows[0]["margin"]
    ax.axvspan(-margin, margin, color=GRID, alpha=0.6, zorder=0, linewidth=0)
    zero(ax)
    for i, f in enumerate(rows):
        colour, shape = VERDICT_COLOUR[f["verdict"]], VERDICT_MARK[f["verdict"]]
        ax.plot(f["interval"], [i, i], color=colour, linewidth=1.6)
        ax.plot(f["effect"], i, shape, color=colour, markersize=6)
    # A hopeless interval must not flatten the others, but every effect is in the picture.
    reach = np.array([np.abs([f["effect"], *f["interval"]]).max() for f in rows])
    effects = max(abs(f["effect"]) for f in rows)
    usual = max(float(np.median(reach)) * 4, 3 * margin, 1.1 * effects)
    if reach.max() > usual:
        ax.set_xlim(-usual, usual)
    rows_above(ax, [versus(f["arm_label"], f["reference_label"]) for f in rows])
    ax.set_xlabel(f"difference in {label_of(endpoint)}, 95% interval\n(grey: within the margin of {margin:.3g})")
    ax.grid(axis="y", visible=False)
    handles = [ax.plot([], [], VERDICT_MARK[v], color=VERDICT_COLOUR[v], label=v)[0] for v in VERDICT_COLOUR]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    more = f" (first {len(rows)} of {len(shown)})" if len(shown) > len(rows) else ""
    view.figures.append((f"verdicts_{endpoint}", f"Differences in {label_of(endpoint)}{more}", figure))
