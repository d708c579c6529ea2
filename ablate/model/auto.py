"""Let the Auto classes of `transformers` read converted models once this package is imported.

Nothing is imported for that: `transformers` is taken note of when somebody else imports it, and a converted model's
classes are made when its type is first asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Register = Callable[[str], Any]
PREFIX = "ablate_"
"""What a converted model's type starts with."""
CONFIGURATIONS = "transformers.models.auto.configuration_auto"
"""The module of `transformers` that maps model types to configuration classes."""


def announce(register: Register) -> None:
    """Extend the Auto classes' table of types: now where `transformers` is imported, else as soon as it is.

    `register` makes the converted form of a model class known, by the class's name.
    """
    if CONFIGURATIONS in sys.modules:
        _extend(sys.modules[CONFIGURATIONS], register)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(register))


class _Finder(MetaPathFinder):
    """Extends the table right after the module that holds it was imported, and then goes."""

    def __init__(self, register: Register) -> None:
        self.register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if fullname != CONFIGURATIONS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _extend(module, self.register)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _extend(module: Any, register: Register) -> None:
    table: Any = getattr(module, "CONFIG_MAPPING", None)
    known = getattr(table, "_extra_content", None)
    if isinstance(known, dict) and not isinstance(known, _Types):
        table._extra_content = _Types(known, register, table)


class _Types(dict[str, Any]):
    """Types registered beside those of `transformers` itself; asking for a converted model's type registers it."""

    def __init__(self, known: dict[str, Any], register: Register, table: Any) -> None:
        super().__init__(known)
        self.register, self.table = register, table

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key) and isinstance(key, str) and key.startswith(PREFIX):
            self._register(key.removeprefix(PREFIX))
        return super().__contains__(key)

    def _register(self, base_type: str) -> None:
        import transformers

        table = self.table
        base = (
            transformers.AutoModelForCausalLM._model_mapping.get(table[base_type], None) if base_type in table else None
        )
        if base is not None:
            self.register(base.__name__)
