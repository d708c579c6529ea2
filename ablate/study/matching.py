"""Sizes worked out so that a tree layer has as many units as the base's: `match: total_units` or `active_units`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from ablate.config import ConfigError, Tree

# Fields that decide a tree layer's units.
SHAPE = ("tree.trees", "tree.depth", "tree.leaf_width", "tree.node_output")
# A matched size is rounded to whole units; further off than this, the arms would not be a matched comparison.
# A fraction, because 44 units are 10% more than 40 and in floating point a little more than that.
TOLERANCE = Fraction(1, 10)


def allowed(target: int) -> tuple[int, int]:
    """Return the fewest and the most units that count as equal to the target."""
    return ceil(target * (1 - TOLERANCE)), floor(target * (1 + TOLERANCE))


@dataclass(frozen=True, slots=True)
class Derived:
    """The size that meets a match best."""

    field: str
    """`leaf_width` or `trees`."""
    value: int
    units: int
    off: float
    """Relative distance from the target."""
    close: bool
    """Whether the units are within the tolerance."""


def derived_field(match: str, changed: Collection[str], who: str) -> str:
    """Return the size that follows from the others: leaf_width where no change sets it, else trees.

    Raises:
        ConfigError: both are set, so that nothing is left to derive; `who` names the arm or the search.
    """
    for field in ("leaf_width", "trees"):
        if f"tree.{field}" not in changed:
            return field
    raise ConfigError(
        f"match is {match!r}: {who} sets both tree.leaf_width and tree.trees; leave one out, to be derived"
    )


def derive(match: str, target: int, tree: Tree, field: str) -> Derived:
    """Work out the derived size of a tree layer.

    Args:
        match: `total_units` or `active_units`, which units are to be equal.
        target: the base's units.
        tree: the layer; its own value of `field` is ignored.
        field: `leaf_width` or `trees`.
    """
    inner, path = tree.leaves - 1, tree.depth * tree.node_output
    if match == "total_units":
        each = inner + tree.leaves * tree.leaf_width
        exact = (target / tree.trees - inner) / tree.leaves if field == "leaf_width" else target / each
    else:
        exact = target / tree.trees - path if field == "leaf_width" else target / (path + tree.leaf_width)
    value = max(1, round(exact))
    units: int = getattr(tree.model_copy(update={field: value}), match)
    least, most = allowed(target)
    return Derived(field, value, units, units / target - 1, least <= units <= most)
