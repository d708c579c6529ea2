"""The JSON schema of a study file: editors that know it complete keys, show their meaning and mark mistakes."""

from __future__ import annotations

import json
from typing import Any

from ablate.config.settings import Trial
from ablate.config.study import Study, factor_fields

FILE = "study.schema.json"
"""Its name beside study files."""
HEADER = f"# yaml-language-server: $schema={FILE}"
"""First line of a study file, for editors with the YAML language server."""
SCALAR = {"type": ["boolean", "integer", "number", "string", "null"]}


def schema() -> dict[str, Any]:
    """Return the schema of a study file, with the sections of `base` and the names of factors spelled out."""
    study, trial = Study.model_json_schema(), Trial.model_json_schema()
    sections = {name: field for name, field in trial["properties"].items() if "$ref" in field}
    fields = study["properties"]
    fields["base"] = {
        "type": "object",
        "description": fields["base"]["description"],
        "properties": sections,
        "additionalProperties": False,
    }
    known = {"enum": factor_fields()}
    levels = {"type": "array", "items": SCALAR, "minItems": 1}
    fields["factors"]["additionalProperties"] = {"anyOf": [levels, {"$ref": "#/$defs/Factor"}]}
    fields["factors"]["propertyNames"] = known
    fields["arms"]["additionalProperties"]["propertyNames"] = known
    fields["sampler"]["anyOf"] = [{"$ref": fields["sampler"].pop("$ref")}, {"type": "string"}]
    fields["tune"]["anyOf"].append({"enum": ["none", "bracket"]})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **study,
        "title": "A study file of ablate",
        "required": [],  # a file's name gives the study's
        "$defs": study["$defs"] | trial["$defs"],
    }


def text() -> str:
    """Return the schema as a file's content."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
