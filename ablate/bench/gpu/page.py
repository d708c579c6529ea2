"""One page of what the lane measured: a table a section, bars where one number compares rows. Needs no library."""

from __future__ import annotations

from html import escape
from typing import Any

from ablate.bench.gpu.lane import Outcome

BARS = {
    "contenders": "times_tree",
    "predictions": "measured_over_predicted",
    "steps": "tokens_per_second",
    "decoding": "times_tree",
}
"""The column of a section that is drawn as bars."""
STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0 1.6em;display:block;overflow-x:auto}
th,td{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td.text,th.text{text-align:left}.bad{color:#b00020}.bar{background:#33658a;height:.8em;display:inline-block}
td.plot{text-align:left;min-width:160px}p.note{color:#555}"""


def page(about: dict[str, Any], outcomes: list[Outcome]) -> str:
    """Return the page as HTML; `about` is what is known of the machine and the versions."""
    facts = "".join(
        f"<tr><td class=text>{escape(k)}</td><td class=text>{escape(str(v))}</td></tr>" for k, v in about.items()
    )
    body = "".join(_section(outcome) for outcome in outcomes)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Tree kernels on {escape(str(about['device']))}</title><style>{STYLE}</style>"
        f"<h1>Tree kernels on {escape(str(about['device']))}</h1>"
        f"<p class=note>Times are medians. <i>times_tree</i> is how many times longer than the tree; over 1, the tree is "
        f"faster. <i>of_copy</i> and <i>of_product</i> are fractions of the measured copy rate and product rate.</p>"
        f"<table>{facts}</table>{body}</html>\n"
    )


def _section(outcome: Outcome) -> str:
    head = f"<h2>{escape(outcome.title)}</h2>"
    if outcome.error:
        return f"{head}<p class=bad>{escape(outcome.error)}</p>"
    columns = list(dict.fromkeys(key for row in outcome.rows for key in row))
    bar = BARS.get(outcome.name)
    # A step faster by a hundred times must not hide the rest: bars end at the tenth largest value.
    values = sorted((row[bar] for row in outcome.rows if row.get(bar) is not None), reverse=True) if bar else []
    top = values[min(len(values) - 1, len(values) // 10)] if values else 1.0
    text = {c for c in columns if any(isinstance(row.get(c), str) for row in outcome.rows)}
    cells = "".join(f"<th{' class=text' if c in text else ''}>{escape(c)}</th>" for c in columns)
    lines = [f"<tr>{cells}{'<th></th>' if bar else ''}</tr>"]
    for row in outcome.rows:
        cells = "".join(f"<td{_class(row.get(c), c in text)}>{escape(_show(c, row.get(c)))}</td>" for c in columns)
        if bar:
            width = 0.0 if row.get(bar) is None else min(1.0, row[bar] / top)
            cells += f"<td class=plot><span class=bar style='width:{150 * width:.0f}px'></span></td>"
        lines.append(f"<tr>{cells}</tr>")
    return f"{head}<p class=note>{outcome.seconds:.0f} s</p><table>{''.join(lines)}</table>"


def _class(value: object, text: bool) -> str:
    names = [*(["text"] if text else []), *(["bad"] if value is False else [])]
    return f" class='{' '.join(names)}'" if names else ""


def _show(column: str, value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        if column in {"seconds", "predicted", "graph_seconds"}:
            return f"{value * 1e6:,.1f} µs"
        return f"{value:.1%}" if column.startswith("of_") else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)
