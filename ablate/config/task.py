"""What a trial learns: the section `task` of its settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ablate.config.section import Settings

TaskKind = Literal["language", "facts", "teacher", "digits"]
DIGIT_PATCHES = 16
"""Patches that an image of digits is cut into."""

OWN = {"facts": ("facts", "classes", "keys", "spectrum", "keys_file"), "teacher": ("teacher_width",)}
"""The settings that only one kind of task reads."""


class Task(Settings):
    """What a trial learns. Every task but language needs no corpus; facts and teacher are one feed-forward layer."""

    kind: TaskKind = "language"
    """language: next tokens of a corpus; facts: the class of each of N random keys; teacher: a random network's output;
    digits: the class of handwritten digits."""
    facts: Annotated[int, Field(ge=2, le=2**22)] = 8192
    """facts: N, keys to remember."""
    classes: Annotated[int, Field(ge=2, le=2**16)] = 64
    """facts: C; each key has one of so many classes."""
    keys: Literal["iid", "correlated", "residual"] = "iid"
    """facts: equal variance in every direction, the one that `spectrum` gives, or vectors of a trained model from `keys_file`."""
    spectrum: Annotated[float, Field(ge=0, le=8)] = 1.0
    """facts with correlated keys: the i-th direction's variance is i to the power of minus this."""
    keys_file: str | None = None
    """facts with residual keys: what `ablate keys` wrote."""
    teacher_width: Annotated[int, Field(ge=1, le=2**16)] = 64
    """teacher: T, hidden units of the network that is learnt."""

    @model_validator(mode="after")
    def _own(self) -> Self:
        for kind, names in OWN.items():
            for name in names:
                value = getattr(self, name)
                if kind != self.kind and value != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is {value!r}: only task {kind!r} has it, not {self.kind!r}")
        if self.keys != "correlated" and self.spectrum != type(self).model_fields["spectrum"].default:
            raise ValueError(f"spectrum is {self.spectrum!r}: it needs keys 'correlated'")
        if (self.keys == "residual") != bool(self.keys_file):
            raise ValueError(f"keys_file is {self.keys_file!r}: it is given with keys 'residual', and only then")
        return self


def kind_of(base: Any, preset: dict[str, dict[str, Any]]) -> str:
    """Return the kind of task of a study's plain base over a preset, before either is checked."""
    section = base.get("task") if isinstance(base, dict) else None
    named = section.get("kind") if isinstance(section, dict) else None
    return str(named or preset.get("task", {}).get("kind") or Task.model_fields["kind"].default)
