"""Two-level fractional factorials: their runs, and which effects they cannot tell apart.

Source: Box, Hunter & Hunter, Statistics for Experimenters, 2nd ed., chapter 6.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ablate.config import ConfigError, Scalar, Study

Word = frozenset[str]

# Beyond these, listing what a fraction confounds takes minutes.
MOST_FACTORS, MOST_GENERATORS = 40, 12


@dataclass(frozen=True, slots=True)
class Fraction:
    """A fraction of the two-level grid, given by generators."""

    levels: dict[str, tuple[Scalar, Scalar]]
    """Factor to its low (-1) and high (+1) level, in the study's order."""
    generators: dict[str, tuple[int, Word]]
    """Generated factor to the sign and factors of its product."""

    def runs(self) -> list[dict[str, Scalar]]:
        """Every run, as factor to level."""
        basic = [key for key in self.levels if key not in self.generators]
        runs = []
        for codes in itertools.product((-1, 1), repeat=len(basic)):
            code = dict(zip(basic, codes, strict=True))
            for key, (sign, word) in self.generators.items():
                code[key] = sign
                for other in word:
                    code[key] *= code[other]
            runs.append({key: self.levels[key][code[key] > 0] for key in self.levels})
        return runs

    def words(self) -> list[tuple[int, Word]]:
        """The defining relation: every product of factors that is constant over the runs, with its sign."""
        single = [(sign, word ^ {key}) for key, (sign, word) in self.generators.items()]
        words = []
        for size in range(1, len(single) + 1):
            for chosen in itertools.combinations(single, size):
                sign, word = 1, frozenset[str]()
                for s, w in chosen:
                    sign, word = sign * s, word ^ w
                words.append((sign, word))
        return words

    @property
    def resolution(self) -> int:
        """Length of the shortest word: III confounds main effects with pairs, IV pairs with pairs."""
        return min(len(word) for _, word in self.words())

    def aliases(self) -> list[tuple[str, ...]]:
        """Groups of main effects and pairs that share one estimate, each written `a` or `a·b`, negatives `-a·b`."""
        effects = [frozenset(c) for size in (1, 2) for c in itertools.combinations(self.levels, size)]
        seen: set[Word] = set()
        groups = []
        for effect in effects:
            if effect in seen:
                continue
            group = [(1, effect)]
            group += [(sign, word ^ effect) for sign, word in self.words() if 1 <= len(word ^ effect) <= 2]
            seen |= {word for _, word in group}
            if len(group) > 1:
                groups.append(tuple(("-" if sign < 0 else "") + self._name(word) for sign, word in group))
        return groups

    def describe(self) -> list[str]:
        """The fraction in words, for the plan."""
        count = len(self.levels) - len(self.generators)
        lines = [f"fraction: {2**count} of {2 ** len(self.levels)} runs, resolution {self.resolution}"]
        return lines + [f"aliased, cannot be separated: {' = '.join(group)}" for group in self.aliases()]

    def _name(self, word: Word) -> str:
        return "·".join(key for key in self.levels if key in word)


def fraction_of(study: Study) -> Fraction:
    """Parse a study's generators. Raises ConfigError for one that is not `factor = [-]factor * factor ...`."""
    levels: dict[str, tuple[Scalar, Scalar]] = {}
    for key, factor in study.factors.items():
        if factor.levels is None or len(factor.levels) != 2:
            raise ConfigError(f"factors.{key}.levels is {factor.levels}: a fraction needs exactly two levels")
        if factor.when:
            raise ConfigError(f"factors.{key}.when: a fraction has no conditional factors")
        levels[key] = (factor.levels[0], factor.levels[1])
    generators: dict[str, tuple[int, Word]] = {}
    for text in study.fraction:
        left, equals, right = text.partition("=")
        key, right = left.strip(), right.strip()
        sign = -1 if right.startswith("-") else 1
        parts = [part.strip() for part in right.lstrip("-").split("*")]
        if (
            not equals
            or key not in levels
            or len(parts) < 2
            or len(set(parts)) < len(parts)
            or set(parts) - set(levels)
        ):
            raise ConfigError(
                f"fraction is {text!r}: 'factor = factor * factor' is expected, with factors {', '.join(levels)}"
            )
        if key in generators:
            raise ConfigError(f"fraction is {text!r}: {key} is generated twice")
        generators[key] = (sign, frozenset(parts))
    for key, (_, word) in generators.items():
        if word & set(generators):
            raise ConfigError(
                f"fraction: {key} is generated from {', '.join(sorted(word & set(generators)))}, itself generated"
            )
    if len(levels) > MOST_FACTORS or len(generators) > MOST_GENERATORS:
        raise ConfigError(
            f"fraction: {len(levels)} factors and {len(generators)} generators; "
            f"at most {MOST_FACTORS} and {MOST_GENERATORS} are possible"
        )
    return Fraction(levels, generators)
