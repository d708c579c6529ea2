"""Write the settings that exist into docs/studies.md, between its two markers, and the schema of study files:
`make docs-settings`.

Type, default, allowed values and meaning come from the models' JSON schema, so the docstring below a field is the only
place where its meaning is written.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ablate.config import PRESETS, Study, Trial
from ablate.config import schema as study_schema

PAGE = Path(__file__).parents[1] / "docs/studies.md"
SCHEMA = Path(__file__).parents[1] / "studies" / study_schema.FILE
START, END = "<!-- settings: written by `make docs-settings` -->\n", "<!-- end of settings -->\n"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SCALAR = {"boolean", "integer", "number", "string"}


def render() -> str:
    """Return the generated part: one table a section of settings, then the presets."""
    study, trial = Study.model_json_schema(), Trial.model_json_schema()
    parts = [_table("The study file", study)]
    for name, schema in study["$defs"].items():
        parts.append(_table(f"{name}, inside a study file", schema))
    for name, field in trial["properties"].items():
        if "$ref" in field:
            schema = trial["$defs"][_target(field)]
            parts.append(_table(f"`base.{name}`", schema))
    seeds = {name: field for name, field in trial["properties"].items() if "$ref" not in field}
    what = "A study file does not set these; `seeds` gives both."
    parts.append(_table("Seeds of one trial", {"properties": seeds, "description": what}))
    return "\n".join([*parts, _presets()])


def page(text: str) -> str:
    """Return the page's text with its generated part replaced; raises ValueError where a marker is missing."""
    before, found, rest = text.partition(START)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{PAGE.name} has lost a marker: {START.strip()} and {END.strip()} are expected")
    return f"{before}{START}\n{render()}\n{END}{after}"


def _table(title: str, schema: dict[str, Any]) -> str:
    intro = " ".join(str(schema.get("description", "")).split())
    rows = [
        f"| `{name}` | {_kind(field)} | {_default(name, field, schema)} | {_meaning(field)} |"
        for name, field in schema["properties"].items()
    ]
    return "\n".join(
        [f"### {title}\n", f"{intro}\n", "| field | values | default | meaning |", "|---|---|---|---|", *rows, ""]
    )


def _target(field: dict[str, Any]) -> str:
    return str(field["$ref"]).rpartition("/")[2]


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return f"mapping: {_target(field)}"
    if "anyOf" in field:
        if {option.get("type") for option in field["anyOf"]} >= SCALAR:
            return "one value"
        return " or ".join(dict.fromkeys(_kind(option) for option in field["anyOf"]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{_plain(value)}`" for value in field.get("enum", [field.get("const")]))
    match field.get("type"):
        case "array":
            if "prefixItems" in field:
                return "list of " + " and ".join(_kind(item) for item in field["prefixItems"])
            least = f" ({field['minItems']} or more)" if field.get("minItems") else ""
            return f"list of {_kind(field['items'])}{least}"
        case "object":
            values = field.get("additionalProperties")
            return f"mapping of name to {_kind(values)}" if isinstance(values, dict) else "mapping"
        case "null":
            return "none"
        case str(kind):
            word = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}[kind]
            limits = [f"{sign} {_bound(field[key])}" for key, sign in BOUNDS.items() if key in field]
            return " ".join([word, ", ".join(limits)]).strip()
    return "any"


def _bound(value: float) -> str:
    """Return a limit; one beside a large power of two is written as that."""
    power = int(value + 1).bit_length() - 1
    off = value - 2**power
    if power < 16 or off not in (0, -1):
        return _plain(value)
    return f"2^{power}" + (" - 1" if off else "")


def _default(name: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    if name in schema.get("required", []):
        return "required"
    value = field.get("default")
    if value is None:
        return "none"
    return "empty" if value in ("", [], {}) or isinstance(value, dict) else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_plain(v) for v in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _meaning(field: dict[str, Any]) -> str:
    return " ".join(str(field.get("description", "")).split()).replace("|", "\\|")


def _presets() -> str:
    rows = []
    for name, sections in PRESETS.items():
        changes = [
            f"{part}.{key}: {_plain(value)}" for part, values in sections.items() for key, value in values.items()
        ]
        rows.append(f"| `{name}` | {', '.join(changes)} |")
    return "\n".join(["### Presets\n", "| preset | settings it changes |", "|---|---|", *rows, ""])


def main(*arguments: str) -> int:
    """Write page and schema; with `--check`, only return 1 where it is out of date."""
    new = {PAGE: page(PAGE.read_text(encoding="utf-8")), SCHEMA: study_schema.text()}
    stale = [path for path, text in new.items() if not (path.exists() and path.read_text(encoding="utf-8") == text)]
    for path in stale:
        if "--check" in arguments:
            print(f"{path.name} is out of date: run `make docs-settings`")
            return 1
        path.write_text(new[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
