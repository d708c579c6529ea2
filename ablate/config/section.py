"""What all settings share: the base class, one-line errors, a short content hash."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from ablate.config.errors import ConfigError, echo


class Section(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Settings(Section):
    """Base of what a user sets: numbers are finite, and true and false are no numbers."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return no_switch(cls, info.field_name, value)


class Grown(Settings):
    """Base of settings that have fields which published studies did not know.

    At its default such a field is left out of the dump, so that hashes of published trials stay as they are.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _as_published(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                data.pop(name, None)
        return data


def no_switch(kind: type[Section], field: str, value: Any) -> Any:
    """Return the value of a field; raises an error of pydantic for true or false where a number is expected."""
    if isinstance(value, bool | list | tuple) and _has_switch(value) and _numeric(kind, field):
        raise PydanticCustomError("number", "a number is expected, not true or false")
    return value


def _has_switch(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(isinstance(v, bool) for v in value))


@cache
def _numeric(kind: type[Section], field: str) -> bool:
    """Return whether a field takes a number or a list of numbers, and no switch."""
    left: list[Any] = [kind.model_fields[field].annotation]
    leaves = set()
    while left:
        annotation = left.pop()
        left += get_args(annotation)
        leaves.add(annotation)
    return bool(leaves & {int, float}) and bool not in leaves


S = TypeVar("S", bound=Section)


def parse(kind: type[S], data: Any, *, where: str = "") -> S:
    """Validate plain data; the first problem becomes a one-line ConfigError with its key, value and what is allowed."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_one_line(error, kind, where)) from None


def _one_line(error: ValidationError, kind: type[Section], where: str) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(_part(part) for part in ((where,) if where else ()) + first["loc"])
    value = echo(first["input"])
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown setting; allowed here: {', '.join(_allowed(kind, first['loc'][:-1]))}"
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        return f"{key}: {text}" if key else text
    return f"{key} is {value}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _part(part: int | str) -> str:
    """Return a part of a key as it may be shown: a user's own names can hold anything."""
    text = str(part)
    return text if text.isprintable() and len(text) <= 80 else echo(text)


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
