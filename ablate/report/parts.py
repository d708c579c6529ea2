"""What a report is made of: views, and tables as HTML, Markdown, LaTeX and CSV with all text escaped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape
from typing import Any

import polars as pl
from markupsafe import Markup
from matplotlib.figure import Figure

SHOWN_IDS = 3


@dataclass(frozen=True)
class Column:
    """One column: `form` is text, a number format such as '.3f' or '+.4f', or `runs` for a list of run ids."""

    key: str
    title: str
    form: str = "text"
    help: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain values under typed columns."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    limit: int = 200
    """Rows shown in the page; the files have all."""


@dataclass
class View:
    """One section of the report; `missing` says what to run where its data are not there."""

    id: str
    title: str
    question: str
    reading: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    """A heading and longer sentences, folded away in the page."""
    figures: list[tuple[str, str, Figure]] = field(default_factory=list)
    """File name without ending, caption, figure."""
    plots: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Accessible label and plotly specification; shown in place of the figures where scripts run."""
    widgets: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Kind (heat, tree, runs) and data for the page's own script."""
    tables: list[Table] = field(default_factory=list)
    data: dict[str, pl.DataFrame] = field(default_factory=dict)
    """What the figures show, written to tables/ as CSV and parquet."""
    missing: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show but what is missing."""
        return bool(self.missing) and not (self.reading or self.figures or self.tables)


def text_of(value: Any, form: str) -> str:
    """Return a cell as plain text."""
    if value is None:
        return "–"
    if form == "runs":
        ids = [str(v) for v in value]
        more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
        return ", ".join(i[:8] for i in ids[:SHOWN_IDS]) + more
    if form == "text" or isinstance(value, (str, bool)):
        return ", ".join(str(v) for v in value) if isinstance(value, list) else str(value)
    return format(value, form)


def html_table(table: Table, address: str | None) -> str:
    """Return an HTML table in a scrollable, focusable region; run ids are links where MLflow's address is known."""
    head = "".join(
        f'<th scope="col"{_align(c)}{f" title={chr(34)}{escape(c.help)}{chr(34)}" if c.help else ""}>{escape(c.title)}</th>'
        for c in table.columns
    )
    body = []
    for row in table.rows[: table.limit]:
        cells = "".join(_html_cell(c, row.get(c.key), address, i == 0) for i, c in enumerate(table.columns))
        body.append(f"<tr>{cells}</tr>")
    more = len(table.rows) - table.limit
    note = (
        f" The first {table.limit} of {len(table.rows)} rows; all of them in tables/{escape(table.name)}.csv."
        if more > 0
        else ""
    )
    label = escape(table.caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><caption>{label}{note}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _align(column: Column) -> str:
    return "" if column.form in {"text", "runs"} else ' class="n"'


def _html_cell(column: Column, value: Any, address: str | None, first: bool) -> str:
    text = escape(text_of(value, column.form))
    if column.form == "runs" and value:
        text = run_links([str(v) for v in value], address)
    if column.key == "verdict":
        text = f'<span class="verdict {text}">{text}</span>'
    if first:
        return f'<th scope="row">{text}</th>'
    kind = _align(column) or (' class="long"' if len(text) > 60 and column.form == "text" else ' class="t"')
    kind = ' class="s"' if column.form == "text" and len(text) <= 24 else kind
    return f"<td{kind}>{text}</td>"


def run_links(ids: list[str], address: str | None) -> str:
    """Return short run ids as HTML, at most three, each linking to MLflow where its address is known."""
    shown = []
    for i in ids[:SHOWN_IDS]:
        short = f"<code>{escape(i[:8])}</code>"
        known = address and re.fullmatch(r"[0-9a-f]{32}", i)
        shown.append(
            f'<a href="{escape(address or "")}/#/runs/{i}?workflowType=machine_learning">{short}</a>'
            if known
            else short
        )
    more = f" +{len(ids) - SHOWN_IDS}" if len(ids) > SHOWN_IDS else ""
    return f'<span class="runs">{" ".join(shown)}{more}</span>'


def prose(text: str) -> Markup:
    """Return a sentence as HTML, escaped, with `commands` in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text)))


def markdown_prose(text: str) -> str:
    """Return a sentence as Markdown, escaped, with `commands` in backticks as code spans."""
    parts = re.split(r"`([^`]+)`", " ".join(text.split()))
    return "".join(f"`{p}`" if i % 2 else _escaped(p) for i, p in enumerate(parts))


def markdown(text: str) -> str:
    """Return text with everything that Markdown or HTML would read as markup escaped."""
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", escape(text, quote=False))


def markdown_table(table: Table) -> str:
    """Return a Markdown table."""
    columns = table.columns
    lines = ["| " + " | ".join(markdown(c.title) for c in columns) + " |"]
    lines.append("|" + "|".join("---" if c.form in {"text", "runs"} else "---:" for c in columns) + "|")
    for row in table.rows[: table.limit]:
        lines.append("| " + " | ".join(markdown(text_of(row.get(c.key), c.form)) for c in columns) + " |")
    if len(table.rows) > table.limit:
        lines.append(f"\nThe first {table.limit} of {len(table.rows)} rows; all of them in tables/{table.name}.csv.")
    return "\n".join(lines)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|":
    r"\textbar{}",
    "–": "--", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "Δ": r"$\Delta$", "²": r"$^2$", "ω": r"$\omega$",
    "κ": r"$\kappa$", "−": "-", "·": r"$\cdot$",
}  # fmt: skip


def latex(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()))


def latex_table(table: Table) -> str:
    """Return a booktabs tabular inside a table environment."""
    columns = [c for c in table.columns if c.form != "runs"]
    spec = "".join("l" if c.form == "text" else "r" for c in columns)
    rows = [
        " & ".join(latex(text_of(r.get(c.key), c.form)) for c in columns) + r" \\" for r in table.rows[: table.limit]
    ]
    head = " & ".join(latex(c.title) for c in columns) + r" \\"
    caption = rf"\caption{{{latex(table.caption)}}}"
    start = [r"\begin{table}", r"\centering", caption, rf"\begin{{tabular}}{{{spec}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*start, *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def frame_of(table: Table) -> pl.DataFrame:
    """Return all rows as a frame, lists joined by spaces."""
    data = {}
    for c in table.columns:
        values = [r.get(c.key) for r in table.rows]
        if any(isinstance(v, (list, str)) for v in values) or c.form in {"text", "runs"}:
            data[c.key] = pl.Series(c.key, [_flat(v) for v in values], pl.String)
        else:
            data[c.key] = pl.Series(c.key, [None if v is None else float(v) for v in values], pl.Float64)
    return pl.DataFrame(data)


def _flat(value: Any) -> str | None:
    if value is None:
        return None
    return " ".join(str(v) for v in value) if isinstance(value, list) else str(value)


def safe_csv(frame: pl.DataFrame) -> str:
    """Return CSV in which no text cell starts a spreadsheet formula, floats at ten significant digits."""
    text = [c for c, dtype in frame.schema.items() if dtype == pl.String]
    starts = r"^[=+\-@\t\r]"
    guarded = [
        pl.when(pl.col(c).str.contains(starts)).then("'" + pl.col(c)).otherwise(pl.col(c)).alias(c) for c in text
    ]
    floats = [pl.col(c).round_sig_figs(10) for c, dtype in frame.schema.items() if dtype.is_float()]
    return frame.with_columns(guarded + floats).write_csv()
