"""Candidates and finalists: what the search found, how sure that is, and how far the finalists fell on fresh seeds."""

from __future__ import annotations

from typing import Any

from ablate.analysis.search.story import text
from ablate.config.endpoints import label_of
from ablate.report.context import Context
from ablate.report.draw import few_ticks, mark
from ablate.report.parts import Column, Table, View
from ablate.report.style import MUTED, new
from ablate.report.views.search.words import axis, form, nothing, objectives, setting_columns, sound

DRAWN = 20  # candidates in the figure


def candidates(c: Context) -> View:
    """Every candidate with its settings, means, intervals and runs, best first; the finalists on fresh seeds."""
    view = View("candidates", "Candidates and finalists", "What did the search find, and does it hold on fresh seeds?")
    search = c.findings["search"]
    view.reading = list(search["headline"])
    view.reading += [f"Kept fixed: {n}" for n in search["held"]] + [f"Not possible: {n}" for n in search["left_out"]]
    if not sound(c):
        view.missing = nothing(c)
    _finalists(c, view)
    _table(c, view)
    if sound(c):
        _figure(c, view)
    return view


def _table(c: Context, view: View) -> None:
    search, known = c.findings["search"], objectives(c)
    rows = []
    for r in search["candidates"]:
        row: dict[str, Any] = {
            "arm": r["arm"],
            "rank": r["rank"],
            "probability": r["probability"],
            "runs": r["run_ids"],
        }
        for o in known:
            m = (r["racing"] or {}).get(o)
            if m:
                low, high = m["interval"] or (None, None)
                row |= {o: m["mean"], f"{o} low": low, f"{o} high": high, "n": m["n"]}
            fresh = (r["fresh"] or {}).get(o)
            row[f"{o} fresh"] = fresh["mean"] if fresh else None
        row |= {f"set {f}": text(r["settings"][f]) if f in r["settings"] else "–" for f in search["factors"]}
        row["became"] = r["out"] or _became(r)
        row["origin"] = r["origin"] or "–"
        rows.append(row)
    columns = [Column("arm", "candidate"), Column("rank", "rank", "d"), *setting_columns(c)]
    for o in known:
        columns += [
            Column(o, o, form(o), "mean over racing seeds, corrected for seeds that a stopped candidate did not run"),
            Column(f"{o} low", "95% from", form(o), "from the spread of a run pooled over all candidates"),
            Column(f"{o} high", "to", form(o)),
        ]
    columns.append(Column("n", "n", "d", "racing seeds"))
    if any(r["fresh"] for r in search["candidates"]):
        columns += [Column(f"{o} fresh", f"{o}, fresh seeds", form(o)) for o in known]
    title = "P(not beaten)" if len(known) > 1 else "P(best)"
    columns.append(Column("probability", title, ".2f", "share of 1,000 draws of all means in which no other is better"))
    columns += [Column("became", "what became of it"), Column("origin", "origin"), Column("runs", "runs", "runs")]
    view.tables.append(Table("candidates", "Every candidate, best first", columns, rows))


def _became(r: dict[str, Any]) -> str:
    failed = [f"{n} {s}" for s, n in r["statuses"].items() if s != "finished"]
    return ", ".join(failed) or ("finalist" if r["fresh"] else "finished")


def _finalists(c: Context, view: View) -> None:
    found = c.findings["search"]["finalists"]
    if not found:
        return
    rows = []
    for f in found:
        low, high = f["interval"] or (None, None)
        d_low, d_high = f["difference_interval"] or (None, None)
        keys = ("arm", "objective", "racing", "fresh", "n", "fall", "difference")
        rows.append(
            {
                **{k: f[k] for k in keys},
                "low": low,
                "high": high,
                "from": d_low,
                "to": d_high,
                "against": "the best" if f["arm"] == f["best"] else f["best"],
                "runs": f["run_ids"],
            }
        )
    columns = [
        Column("arm", "candidate"),
        Column("objective", "objective"),
        Column("racing", "in the race", ".4f"),
        Column("fresh", "on fresh seeds", ".4f"),
        Column("n", "n", "d", "fresh seeds"),
        Column("fall", "got worse by", "+.4f", "above 0: worse on fresh seeds than in the race"),
        Column("low", "95% from", "+.4f"),
        Column("high", "to", "+.4f"),
        Column("against", "against"),
        Column("difference", "difference", "+.4f", "paired over fresh seeds, from the best finalist on this objective"),
        Column("from", "95% from", "+.4f"),
        Column("to", "to", "+.4f"),
        Column("runs", "runs", "runs"),
    ]
    caption = "Finalists: racing mean against fresh seeds, and against the best of them (exploratory, not adjusted)"
    view.tables.append(Table("finalists", caption, columns, rows))


def _figure(c: Context, view: View) -> None:
    shown = sound(c)[:DRAWN]
    known = objectives(c)
    figure = new(7.6, 0.26 * len(shown) + 1.3)
    axes = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for ax, o in zip(axes, known, strict=True):
        for i, r in enumerate(shown[::-1]):
            style = c.styles.arms[r["arm"]]
            for phase, shift, filled in (("racing", 0.14, False), ("fresh", -0.14, True)):
                m = (r[phase] or {}).get(o)
                if not m:
                    continue
                look = mark(style) | ({} if filled else {"markerfacecolor": "none"})
                if m["interval"]:
                    ax.plot(m["interval"], [i + shift] * 2, color=style.colour, linewidth=1.2, alpha=0.8)
                ax.plot(m["mean"], i + shift, linestyle="none", markersize=5.5, **look)
        ax.set_xlabel(axis(c, o) if len(known) < 3 else label_of(o))
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(shown)), [r["arm"] for r in shown[::-1]])
    few_ticks(*axes, count=4 if len(known) > 1 else 6)
    handles = [
        axes[0].plot([], [], "o", color=MUTED, markerfacecolor="none", label="racing seeds")[0],
        axes[0].plot([], [], "o", color=MUTED, label="fresh seeds")[0],
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    first = f"the first {len(shown)} of {len(sound(c))}" if len(sound(c)) > len(shown) else "all that finished"
    view.figures.append(("candidates", f"Candidates in their order ({first}), means with 95% intervals", figure))
