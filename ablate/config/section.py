"""What all settings share: the base class, one-line errors, a short content hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A setting that cannot be used; its message is one line that names the key, echoes the value, says what is allowed."""


class Section(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


S = TypeVar("S", bound=Section)


def parse(kind: type[S], data: Any, *, where: str = "") -> S:
    """Validate plain data; the first problem becomes a one-line ConfigError with its key, value and what is allowed."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_one_line(error, kind, where)) from None


def _one_line(error: ValidationError, kind: type[Section], where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in ((where,) if where else ()) + first["loc"])
    value = repr(first["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown setting; allowed here: {', '.join(_allowed(kind, first['loc'][:-1]))}"
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        return f"{key}: {text}" if key else text
    return f"{key} is {value}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _allowed(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        field = kind.model_fields.get(str(part))
        inner = (field.annotation, *get_args(field.annotation)) if field else ()
        kind = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), kind)
    return list(kind.model_fields)


def digest(data: Any) -> str:
    """Twelve hex digits of SHA-256 over canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
