"""`ablate compare A B`: one short page in Markdown, with its tables."""

from __future__ import annotations

from pathlib import Path

from ablate.analysis.compare import compare_tables
from ablate.analysis.frames import canonical, load
from ablate.files import write_text
from ablate.report import parts
from ablate.report.parts import Column, Table
from ablate.results.layout import OWN


def compare(study_a: str, study_b: str, root: Path) -> Path:
    """Write out/compare/<A>-<B>/ (comparison.json, report.md, tables/) and return its path.

    Raises:
        ConfigError: a study file or table is missing, or the studies have nothing in common.
    """
    data = compare_tables(load(study_a, root), load(study_b, root))
    folder = root / OWN / "compare" / f"{study_a}-{study_b}"
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    write_text(folder / "comparison.json", canonical(data))
    questions = [
        {
            **{k: q[k] for k in ("choice", "against", "endpoint", "outcome")},
            "first": q["verdicts"][0], "second": q["verdicts"][1], "effect_first": q["effects"][0],
            "effect_second": q["effects"][1], "n": f"{q['n'][0]} and {q['n'][1]}",
        }
        for q in data["questions"]
    ]  # fmt: skip
    arms = [
        {
            "arm": r["label"], "endpoint": r["endpoint"], "first": r["means"][0], "second": r["means"][1],
            "effect": r["effect"], "low": (r["interval"] or [None])[0], "high": (r["interval"] or [None, None])[1],
            "p_adjusted": r["p_adjusted"], "n": f"{r['n'][0]} and {r['n'][1]}", "runs": [*r["run_ids"][0], *r["run_ids"][1]],
        }
        for r in data["arms"]
    ]  # fmt: skip
    tables = [
        Table("questions", f"Questions that both asked: {study_a}, then {study_b}", [
            Column("choice", "choice"), Column("against", "against"), Column("endpoint", "endpoint"),
            Column("first", study_a), Column("second", study_b), Column("effect_first", "effect there", "+.4f"),
            Column("effect_second", "and here", "+.4f"), Column("n", "n"), Column("outcome", "outcome"),
        ], questions),
        Table("arms", f"Arms that both ran: {study_b} minus {study_a} (Welch, Benjamini-Hochberg)", [
            Column("arm", "arm"), Column("endpoint", "endpoint"), Column("first", study_a, ".4f"), Column("second", study_b, ".4f"),
            Column("effect", "difference", "+.4f"), Column("low", "95% from", "+.4f"), Column("high", "to", "+.4f"),
            Column("p_adjusted", "adjusted p", ".3g"), Column("n", "n"), Column("runs", "runs", "runs"),
        ], arms),
    ]  # fmt: skip
    count = {k: sum(q["outcome"] == k for q in data["questions"]) for k in ("the same", "contradicted", "open")}
    lines = [f"# {parts.markdown(study_a)} and {parts.markdown(study_b)}", ""]
    lines += [f"- Careful: {parts.markdown(w)}." for w in data["warnings"]]
    lines += [
        f"- Of {len(data['questions'])} questions that both asked, {count['the same']} have the same verdict, "
        f"{count['contradicted']} contradict each other, {count['open']} are settled in one study at most.",
        "- Runs of two studies share neither seeds nor data order by design, so arms are compared unpaired.",
        "",
    ]
    for table in tables:
        if table.rows:
            lines += [f"## {parts.markdown(table.caption)}", "", parts.markdown_table(table), ""]
            frame = parts.frame_of(table)
            write_text(folder / "tables" / f"{table.name}.csv", parts.safe_csv(frame))
            write_text(folder / "tables" / f"{table.name}.tex", parts.latex_table(table))
            frame.write_parquet(folder / "tables" / f"{table.name}.parquet")
    write_text(folder / "report.md", "\n".join(lines))
    return folder
