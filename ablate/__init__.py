"""Which architectural choices keep tree-structured feed-forward layers balanced, and what each choice costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablate.model.tree import TreeFeedForward as TreeFeedForward

__all__ = ["TreeFeedForward"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: reports and `--help` need no torch.
    if name == "TreeFeedForward":
        from ablate.model.tree import TreeFeedForward

        return TreeFeedForward
    raise AttributeError(f"module 'ablate' has no attribute {name!r}")
