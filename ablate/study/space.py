"""The space of a search: which settings its candidates may have, and which combinations can exist."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from ablate.config import ConfigError, Factor, Scalar, Study, Trial, check_field, echo, integer_field
from ablate.study.arms import Arm, exists, factor_keys, matched, ordered_factors
from ablate.study.matching import SHAPE, derive, derived_field

# Shapes that are looked at one by one; a larger space is sampled only.
MAX_SHAPES = 20_000
# Random candidates that tell how many of a space can exist.
LOOKS = 300

Chosen = dict[str, Scalar]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One combination of a search's factors, with the sizes that follow from it."""

    chosen: Mapping[str, Scalar]
    """Factor to level, only those that exist beside the others."""
    changes: Mapping[str, Scalar]
    """Changes of the base: `chosen` and the derived size."""


class Space:
    """The candidates of a search.

    Args:
        study: a study of design `search`.

    Raises:
        ConfigError: a level or bound that its field does not allow, sizes that leave nothing to derive, or a space in
            which no candidate can exist.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.factors: list[tuple[str, Factor]] = ordered_factors(study)
        self.distributions: dict[str, BaseDistribution] = {}
        self._base = study.trial({})
        notes: list[str] = []
        for key, factor in self.factors:
            self.distributions[key] = _distribution(key, factor)
        self._trim_shapes(notes)
        self._look(notes)
        self.notes: tuple[str, ...] = tuple(notes)
        """What is impossible in this space, each a sentence."""

    @property
    def derived(self) -> str | None:
        """Dotted field of the size that the match works out; None where there is no match or nothing to derive."""
        if self.study.match == "none" or not set(SHAPE) & set(self.study.factors):
            return None
        return f"tree.{derived_field(self.study.match, self.study.factors, 'the search')}"

    @property
    def columns(self) -> list[str]:
        """Dotted fields that differ between candidates: the factors, then the derived size."""
        keys = factor_keys(self.study)
        return keys if self.derived is None or self.derived in keys else [*keys, self.derived]

    @property
    def combinations(self) -> float:
        """Number of distinct combinations, impossible ones included; infinity where a factor is continuous."""
        return math.prod(_count(d) for d in self.distributions.values())

    def table(self) -> list[tuple[str, str, str]]:
        """Return each factor with its values and where it exists, and the derived size, in words."""
        rows = [(key, describe(self.distributions[key]), _text(factor.when)) for key, factor in self.factors]
        if self.derived:
            rows.append((self.derived, f"derived: equal {self.study.match.replace('_', ' ')}", ""))
        return rows

    def candidate(self, chosen: Mapping[str, Scalar]) -> Candidate:
        """Complete a combination with its derived size; raises ConfigError for one that cannot exist."""
        arm = matched(self.study, Arm(label="candidate", kind="arm", changes=dict(chosen)))
        self.study.trial(dict(arm.changes))
        return Candidate(dict(chosen), dict(arm.changes))

    def impossible(self, chosen: Mapping[str, Scalar]) -> str | None:
        """Return why a combination cannot exist; None where it can."""
        try:
            self.candidate(chosen)
        except ConfigError as error:
            return str(error)
        return None

    def trial(self, candidate: Candidate, seed: int) -> Trial:
        """Return the complete configuration of a candidate at a seed."""
        return self.study.trial(dict(candidate.changes), seed=seed)

    def suggest(self, trial: optuna.trial.BaseTrial) -> Chosen:
        """Let a sampler choose each factor's level; a conditional factor only where it exists."""
        chosen: Chosen = {}
        for key, factor in self.factors:
            if exists(factor, chosen):
                chosen[key] = _suggest(trial, key, self.distributions[key])
        return chosen

    def random(self, rng: np.random.Generator) -> Chosen:
        """Draw a combination at random; it may be one that cannot exist."""
        chosen: Chosen = {}
        for key, factor in self.factors:
            if exists(factor, chosen):
                chosen[key] = _draw(self.distributions[key], rng)
        return chosen

    def possible(self, rng: np.random.Generator, count: int, tries: int) -> list[Chosen]:
        """Draw up to `count` combinations that can exist, in at most `tries` tries."""
        drawn = (self.random(rng) for _ in range(tries))
        return list(itertools.islice((c for c in drawn if self.impossible(c) is None), count))

    def read(self, chosen: Mapping[str, Any], where: str) -> Chosen:
        """Check a combination that a user wrote.

        Raises:
            ConfigError: a key that is no factor, a missing factor, a level that is not in the space, or a combination
                that cannot exist.
        """
        if unknown := sorted(set(chosen) - set(self.study.factors)):
            raise ConfigError(
                f"{where}: {unknown[0]!r} is not a factor of this search: {', '.join(self.study.factors)}"
            )
        known: Chosen = {}
        for key, factor in self.factors:
            if not exists(factor, known):
                if key in chosen:
                    raise ConfigError(f"{where}: {key} exists only where {_text(factor.when)}")
                continue
            if key not in chosen:
                raise ConfigError(f"{where}: {key} is missing; a candidate sets every factor")
            distribution = self.distributions[key]
            if not _inside(distribution, value := _settled(key, chosen[key], where)):
                raise ConfigError(f"{where}: {key} is {echo(chosen[key])}; this search has {describe(distribution)}")
            known[key] = int(value) if isinstance(distribution, IntDistribution) else value
        if reason := self.impossible(known):
            raise ConfigError(f"{where}: {reason}")
        return known

    def distance(self, a: Mapping[str, Scalar], b: Mapping[str, Scalar]) -> float:
        """Return how far two combinations lie apart: mean over factors of 0 to 1."""
        return sum(_apart(d, a.get(key), b.get(key)) for key, d in self.distributions.items()) / len(self.distributions)

    def _trim_shapes(self, notes: list[str]) -> None:
        """Leave out levels of depth, width or trees with which no candidate meets the match."""
        field = self.derived
        keys = [key for key, factor in self.factors if key in SHAPE and not factor.when]
        if field is None or not keys:
            return
        values = {key: _values(self.distributions[key]) for key in keys}
        if math.prod(len(v) for v in values.values()) > MAX_SHAPES or any(
            key in SHAPE and factor.when for key, factor in self.factors
        ):
            return
        target: int = getattr(self._base.tree, self.study.match)
        met: dict[str, set[Scalar]] = {key: set() for key in keys}
        nearest: tuple[float, str] = (math.inf, "")
        for combination in itertools.product(*values.values()):
            changes = {key.partition(".")[2]: value for key, value in zip(keys, combination, strict=True)}
            found = derive(
                self.study.match, target, self._base.tree.model_copy(update=changes), field.partition(".")[2]
            )
            if found.close:
                for key, value in zip(keys, combination, strict=True):
                    met[key].add(value)
            elif abs(found.off) < nearest[0]:
                text = ", ".join(f"{k} {v}" for k, v in zip(keys, combination, strict=True))
                nearest = (abs(found.off), f"{text}, {field} {found.value}: {found.units} units")
        if not all(met.values()):
            raise ConfigError(
                f"match is {self.study.match!r}: no candidate comes within the tolerance of the base's {target} units; "
                f"the nearest is {nearest[1]}"
            )
        for key in keys:
            if lost := [v for v in values[key] if v not in met[key]]:
                self.distributions[key] = _without(self.distributions[key], met[key])
                kept = set(_values(self.distributions[key]))
                if gone := [v for v in lost if v not in kept]:
                    names = ", ".join(str(v) for v in gone)
                    notes.append(
                        f"{key} {names} left out: no candidate with it meets {self.study.match} (base: {target})"
                    )

    def _look(self, notes: list[str]) -> None:
        """Draw some combinations: none that can exist is an error, some that cannot are worth a note."""
        rng = np.random.default_rng(0)
        reasons = Counter(self.impossible(self.random(rng)) or "" for _ in range(LOOKS))
        possible = reasons.pop("", 0)
        if not possible and not self.possible(rng, 1, 20 * LOOKS):
            raise ConfigError(
                f"factors: no candidate of {LOOKS * 21} drawn at random can exist, for example {_first(reasons)}"
            )
        if reasons:
            share = f"{1 - possible / LOOKS:.0%}" if 0.05 * LOOKS <= possible < 0.99 * LOOKS else "some"
            share = "most" if possible < 0.05 * LOOKS else share
            notes.append(f"{share} of all combinations cannot exist, most often because {_first(reasons)}")


def describe(distribution: BaseDistribution) -> str:
    """Return a distribution in words: `0.1 to 4, log` or `gelu, relu`."""
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join("none" if c is None else str(c) for c in distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    whole = ", whole numbers" if isinstance(distribution, IntDistribution) else ""
    return f"{distribution.low:g} to {distribution.high:g}{whole}{', log' if distribution.log else ''}"


def _distribution(key: str, factor: Factor) -> BaseDistribution:
    if factor.levels is not None:
        return CategoricalDistribution([check_field(key, level) for level in factor.levels])
    bounds = factor.range
    assert bounds is not None
    if integer_field(key) or bounds.integer:
        for name, value in (("low", bounds.low), ("high", bounds.high)):
            if value != int(value):
                raise ConfigError(f"factors.{key}.range.{name} is {value}: a whole number is expected")
            check_field(key, int(value))
        return IntDistribution(int(bounds.low), int(bounds.high), log=bounds.log)
    check_field(key, bounds.low)
    check_field(key, bounds.high)
    return FloatDistribution(bounds.low, bounds.high, log=bounds.log)


def _suggest(trial: optuna.trial.BaseTrial, key: str, distribution: BaseDistribution) -> Scalar:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(key, distribution.low, distribution.high, log=distribution.log)


def _draw(distribution: BaseDistribution, rng: np.random.Generator) -> Scalar:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(rng.integers(len(distribution.choices)))]
    if isinstance(distribution, IntDistribution):
        if distribution.log:
            drawn = math.exp(rng.uniform(math.log(distribution.low - 0.5), math.log(distribution.high + 0.5)))
            return min(max(round(drawn), distribution.low), distribution.high)
        return int(rng.integers(distribution.low, distribution.high + 1))
    assert isinstance(distribution, FloatDistribution)
    if distribution.log:
        return float(math.exp(rng.uniform(math.log(distribution.low), math.log(distribution.high))))
    return float(rng.uniform(distribution.low, distribution.high))


def _values(distribution: BaseDistribution) -> Sequence[Scalar]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, IntDistribution), "shapes are whole numbers or levels"
    return range(distribution.low, distribution.high + 1)


def _count(distribution: BaseDistribution) -> float:
    return math.inf if isinstance(distribution, FloatDistribution) else len(_values(distribution))


def _without(distribution: BaseDistribution, kept: Iterable[Scalar]) -> BaseDistribution:
    """Drop levels that are not kept; a range is only cut at its ends."""
    if isinstance(distribution, CategoricalDistribution):
        wanted = set(kept)
        return CategoricalDistribution([c for c in distribution.choices if c in wanted])
    assert isinstance(distribution, IntDistribution)
    numbers = [int(v) for v in kept if isinstance(v, int)]
    return IntDistribution(min(numbers), max(numbers), log=distribution.log)


def _inside(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return any(type(c) is type(value) and c == value for c in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    inside = distribution.low <= value <= distribution.high  # before the rest: infinity is no whole number
    return inside and (isinstance(distribution, FloatDistribution) or value == int(value))


def _settled(key: str, value: Any, where: str) -> Any:
    """Return a level as a trial holds it: 0, 0.0 and "0" are one value of a field."""
    try:
        return check_field(key, value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _apart(distribution: BaseDistribution, a: Scalar, b: Scalar) -> float:
    if isinstance(distribution, CategoricalDistribution) or not (
        isinstance(a, int | float) and isinstance(b, int | float)
    ):
        return float(a != b)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        return abs(math.log(a / b)) / max(math.log(high / low), 1e-12)
    return abs(a - b) / max(high - low, 1e-12)


def _text(when: Mapping[str, Scalar]) -> str:
    return " and ".join(f"{key} is {value!r}" for key, value in when.items())


def _first(reasons: Counter[str]) -> str:
    """Return an example of the most frequent kind of message: those that begin with the same word."""
    kinds = Counter[str]()
    for text, count in reasons.items():
        kinds[text.partition(" ")[0]] += count
    kind = kinds.most_common(1)[0][0]
    return next(text for text in reasons if text.startswith(kind)).removeprefix("base.")
