"""Which architectural choices keep tree-structured feed-forward layers balanced, and what each choice costs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ablate.model.auto import announce

if TYPE_CHECKING:
    from ablate.api import load as load
    from ablate.api import run_study as run_study
    from ablate.config import Study as Study
    from ablate.config import Tree as Tree
    from ablate.model.convert import convert as convert
    from ablate.model.convert import from_pretrained as from_pretrained
    from ablate.model.tree import TreeFeedForward as TreeFeedForward

__version__ = "0.1.0"

_HOME = {
    "Study": "ablate.config",
    "Tree": "ablate.config",
    "TreeFeedForward": "ablate.model.tree",
    "convert": "ablate.model.convert",
    "from_pretrained": "ablate.model.convert",
    "load": "ablate.api",
    "run_study": "ablate.api",
}
__all__ = tuple(_HOME)


def _register(base_class: str) -> Any:
    from ablate.model.convert import register

    return register(base_class)


announce(_register)  # to transformers, whenever it is imported


def __getattr__(name: str) -> Any:
    # Imported on first use: reports and `--help` need no torch.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ablate' has no attribute {name!r}")


def __dir__() -> list[str]:
    own = {name for name in globals() if name.startswith("__") and name != "__getattr__"}
    return sorted({*own, *__all__})
