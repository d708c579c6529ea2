"""The story of balance, arm by arm: imbalance at birth, transient collapse, self-pruning."""

from __future__ import annotations

from typing import Any

from ablate.config.endpoints import DEPTH, RESTORED, most_lost
from ablate.report.context import Context
from ablate.report.parts import Table, View
from ablate.report.tables import columns, needs


def balance_story(c: Context) -> View:
    """Show imbalance at birth, transient collapse and self-pruning, an arm a row."""
    view = View(
        "balance", "Imbalance at birth, transient collapse, self-pruning", "Where does imbalance come from, arm by arm?"
    )
    records = [a for a in c.findings["arms"] if a["n_eff_frac"]]
    view.missing = needs(c, "balance")
    if view.missing:
        return view
    keys = {
        "n_eff_frac_start": "n_eff_frac at step 0",
        "n_eff_frac_min": "at its worst",
        "n_eff_frac": "at the end",
        "bits_lost": "bits lost at the end",
        "n_eff_6": f"n_eff_frac of depth {DEPTH} for as many",
        "dead_frac_start": "dead leaves at step 0",
        "dead_frac_max": "dead at the worst",
        "dead_frac": "dead at the end",
        "pruned_frac": "alive at step 0, died, stayed dead",
        "revived_frac": "died and came back",
    }
    rows = [
        {"arm": a["label"], "n": a["n"], **{k: a[k]["mean"] if a[k] else None for k in keys}, "runs": a["run_ids"]}
        for a in records
    ]
    head = columns(
        n=("n", "d"), **{k: (t, ".3f" if k.startswith(("n_eff", "bits")) else ".1%") for k, t in keys.items()}
    )
    view.tables.append(
        Table("balance_story", "Balance at birth, at its worst and at the end (means over seeds)", head, rows)
    )
    view.tables.append(_restored(c))
    described = records if len(records) <= 20 else [a for a in records if a["arm"] in c.shown]
    view.details = ["Arm by arm, in words", *(f"{a['label']}: {a['reading']}" for a in described)]
    view.reading = [overall(records), *([c.choice] if c.choice else [])]
    return view


def _restored(c: Context) -> Table:
    """Return whether balance is restored, criterion by criterion, and at other thresholds."""
    word = {True: "yes", False: "not shown", None: "not known"}
    q = c.quality
    rows = [
        {
            "arm": c.labels[r["arm"]],
            "bits_lost": r["bits_lost"],
            "bits_lost_bound": r["bits_lost_bound"],
            "n_eff_6": r["n_eff_6"],
            "n_eff_frac": r["n_eff_frac"],
            "worst": r["n_eff_frac_worst"],
            "dead": word[r["dead_ok"]],
            "bound": r[f"{q.name}_bound"],
            "p": r[f"{q.name}_p"],
            q.name: word[r[f"{q.name}_ok"]],
            "restored": word[r["restored"]],
            "holds": ", ".join(t for t, v in r["at_threshold"].items() if v) or "none",
            "n": r["n"],
            "runs": r["run_ids"],
        }
        for r in sorted(c.findings["restored"], key=lambda r: r["bits_lost"])
    ]
    head = columns(
        restored="restored",
        bits_lost=("bits lost", ".4f"),
        bits_lost_bound=("at most", ".4f", "upper end of the 95% interval"),
        n_eff_6=(f"n_eff at depth {DEPTH}", ".3f", f"n_eff_frac of a tree of depth {DEPTH} that loses these bits"),
        n_eff_frac=("n_eff_frac", ".3f", "does not compare between depths"),
        worst=("worst tree", ".3f"),
        dead=("dead leaves at most 1%", "text", "by the upper end of the 95% interval"),
        bound=(f"{q.short} bound", "+.4f", "upper end of the difference's interval, of ranks or mean, the worse"),
        p=("adjusted p", ".3g", "of being worse by the margin, over the arms that meet the other criteria"),
        **{q.name: (f"{q.short} no worse", "text", "than the reference arm by the margin")},
        holds="restored at thresholds",
    )
    most = most_lost(RESTORED)
    title = f"Is balance restored? (bits lost at most {most:.4f}: {RESTORED:g} effective leaves at depth {DEPTH})"
    return Table("restored", title, head, rows)


def overall(records: list[dict[str, Any]]) -> str:
    """Return one sentence over all arms."""
    n = len(records)
    counts = {
        s: sum(s in a["signs"] for a in records) for s in ("born_imbalanced", "dips", "self_prunes", "ends_balanced")
    }
    return (
        f"Of {n} tree arms, {counts['born_imbalanced']} start imbalanced before any gradient (n_eff_frac under {RESTORED:g}), "
        f"{counts['dips']} dip below both ends of training (transient collapse), {counts['self_prunes']} prune themselves "
        f"(over 1% of leaves alive at step 0 die and stay dead), and {counts['ends_balanced']} end balanced "
        f"(n_eff_frac at least {RESTORED:g}, at most 1% dead)."
    )
