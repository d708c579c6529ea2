"""Everything of a study into out/<name>/: the page, report.md, figures and tables."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup

from ablate.analysis.findings import analyse
from ablate.analysis.frames import canonical, load
from ablate.config import ConfigError
from ablate.files import clear_stale, write_text
from ablate.report import parts, style, summary
from ablate.report.answer import answer
from ablate.report.context import Context
from ablate.report.parts import View
from ablate.report.views import sections
from ablate.results.kept import KEPT
from ablate.results.layout import Layout

TEMPLATES = Path(__file__).parent / "templates"
PICTURES = "!figures/*.png"
"""The line of a report's own .gitignore that keeps its pictures in git."""


def build(name: str, root: Path, address: str | None = None) -> Path:
    """Write out/<name>/ (index.html, report.md, figures/, tables/, plots/) and return its path.

    Findings are computed first where they are missing or older than the tables. `address` is MLflow's, for links to
    runs.

    Raises:
        ConfigError: a study file or table is missing, or the address is not an http(s) one.
    """
    if address is not None and not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]_/-]+", address):
        raise ConfigError(f"MLflow address is {address!r}: it starts with http:// or https://")
    tables = load(name, root)
    folder = Layout(root, name).report
    clear_stale(folder)
    findings = current_findings(name, root, tables.digests)
    with mpl.rc_context(style.RC):
        context = Context(tables, findings, address.rstrip("/") if address else None)
        views = sections(context)
        _empty(folder / "figures")
        _empty(folder / "tables")
        pictures = _figures(views, folder)
    _tables(views, folder)
    _empty(folder / "plots")
    for name, frame in summary.frames(context).items():
        write_text(folder / "plots" / f"{name}.csv", parts.safe_csv(frame))
    write_text(folder / "report.md", _markdown(context, views, shows_pictures(folder)))
    write_text(folder / "index.html", _page(context, views, pictures))
    return folder


def current_findings(name: str, root: Path, digests: dict[str, str]) -> dict[str, Any]:
    """Return the findings of the tables with these digests; computes and writes them where the file has others."""
    path = Layout(root, name).report / "findings.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["inputs"] == digests:
            return dict(data)
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        pass  # missing, damaged or of another version: computed below
    return dict(json.loads(analyse(name, root).read_text(encoding="utf-8")))


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _figures(views: list[View], folder: Path) -> dict[str, str]:
    pictures = {}
    for view in views:
        for name, _, figure in view.figures:
            style.lay_out(figure)
            pictures[name] = style.svg(figure)
            write_text(folder / "figures" / f"{name}.svg", pictures[name])
            (folder / "figures" / f"{name}.png").write_bytes(style.png(figure))
    return pictures


def _tables(views: list[View], folder: Path) -> None:
    for view in views:
        for table in view.tables:
            frame = parts.frame_of(table)
            write_text(folder / "tables" / f"{table.name}.tex", parts.latex_table(table))
            write_text(folder / "tables" / f"{table.name}.csv", parts.safe_csv(frame))
            frame.write_parquet(folder / "tables" / f"{table.name}.parquet")
        for name, frame in view.data.items():
            write_text(folder / "tables" / f"{name}.csv", parts.safe_csv(frame))
            frame.write_parquet(folder / "tables" / f"{name}.parquet")


def shows_pictures(report: Path) -> bool:
    """Return whether report.md may show pictures: they are on disk, and in git where the folder's .gitignore says so.

    A published study without such a file names its pictures, so that a reader on the web sees none that are broken.
    """
    rules = report / ".gitignore"
    return not (report / KEPT).exists() or (rules.exists() and PICTURES in rules.read_text(encoding="utf-8"))


def _markdown(c: Context, views: list[View], pictures: bool) -> str:
    md = parts.markdown
    lines = [f"# {md(c.findings['title'] or c.tables.name)}", ""]
    said = answer(c)
    lines += [f"**{md(said.headline)}**", ""]
    lines += [f"- {md(word)}: {parts.markdown_prose(text)}" for word, text in said.points]
    lines += [f"- Next: {parts.markdown_prose(said.next)} `{said.command}`", ""]
    lines += [parts.markdown_prose(c.findings["notes"]), ""] if c.findings["notes"] else []
    if not pictures:
        lines += [
            f"`ablate figures {c.tables.name}` draws the figures named below, and the page `index.html`.",
            "",
        ]
    for view in (v for v in views if not v.empty):
        lines += [f"## {md(view.title)}", "", f"*{md(view.question)}*", ""]
        if view.missing:
            lines += [parts.markdown_prose(view.missing), ""]
        for text in [*view.reading, *view.details[1:]]:
            lines += [f"- {parts.markdown_prose(text)}"]
        lines += [""] if view.reading else []
        for name, caption, _ in view.figures:
            shown = (
                f"![{md(caption)}](figures/{name}.png)" if pictures else f"Figure `figures/{name}.png`: {md(caption)}."
            )
            lines += [shown, ""]
        for table in view.tables:
            lines += [f"**{md(table.caption)}**", "", parts.markdown_table(table), ""]
    absent = "; ".join(md(v.title) for v in views if v.empty)
    if absent:
        lines += [f"Not part of this study: {absent}. The page `index.html` says what each one needs.", ""]
    return "\n".join(lines)


def _page(c: Context, views: list[View], pictures: dict[str, str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["prose"] = parts.prose
    plots: dict[str, Any] = {}
    widgets: dict[str, Any] = {}
    shown = []
    for view in (v for v in views if not v.empty):
        plots |= dict(view.plots)
        widgets |= dict(view.widgets)
        figures = [
            {
                "name": name,
                "caption": caption,
                "svg": Markup(style.inline(pictures[name], name, escape(caption))),
                "plot": name in dict(view.plots),
            }
            for name, caption, _ in view.figures
        ]
        tables = [Markup(parts.html_table(t, c.address)) for t in view.tables]
        shown.append({"view": view, "figures": figures, "tables": tables, "widgets": [k for k, _ in view.widgets]})
    scripts = [_plotly(), (TEMPLATES / "report.js").read_text(encoding="utf-8")]
    for script in scripts:
        if "</script" in script.lower() or "<!--" in script:
            raise AssertionError("a script that would end its own element cannot be embedded")
    hashes = ["'sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() + "'" for s in scripts]
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return environment.get_template("report.html.j2").render(
        title=c.findings["title"] or c.tables.name,
        study=c.tables.name,
        findings=c.findings,
        answer=answer(c),
        sections=shown,
        absent=[v for v in views if v.empty],
        policy=policy,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(s) for s in scripts],
        data=Markup(_data({"plots": themed(plots), "widgets": widgets})),
    )


def _plotly() -> str:
    """Return plotly's bundle, in a form that is safe inside a script element."""
    text = (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return re.sub(r"</(script)", r"<\\/\1", text, flags=re.I).replace("<!--", r"\x3c!--")


def _data(data: dict[str, Any]) -> str:
    """Return a JSON block: no text in it can end the element or start a comment."""
    compact = json.dumps(json.loads(canonical(data)), separators=(",", ":"), ensure_ascii=False)
    return f'<script type="application/json" id="data">{compact.replace("<", chr(92) + "u003c")}</script>'


def themed(data: Any) -> Any:
    """Return plot specifications with the palette's colours as CSS variables, which the page resolves by theme."""
    if isinstance(data, dict):
        return {k: themed(v) for k, v in data.items()}
    if isinstance(data, list):
        return [themed(v) for v in data]
    return style.VARIABLES.get(data, data) if isinstance(data, str) else data
