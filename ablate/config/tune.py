"""How the arms of a study get their learning rates: a grid of rates, or a bracket that ends at an interior optimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from ablate.config.endpoints import Endpoint
from ablate.config.errors import ConfigError, echo
from ablate.config.section import Settings, parse
from ablate.config.settings import Seed, Train

# Rates of an arm that is done in the fewest: three in the first bracket, two in the refinement.
LEAST_RATES = 5
RULES = "none, bracket, or a mapping"
HIGHEST = next(bound.le for bound in Train.model_fields["lr"].metadata if hasattr(bound, "le"))
"""The largest rate that a trial may have."""

K = TypeVar("K", int, float)

Values = Sequence[float | None]
"""Quality of one rate on each tuning seed; None where the trial diverged."""


class Tune(Settings):
    """A fixed grid: the same learning rates for every arm, on seeds kept apart from the evaluation seeds."""

    lr: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2)]
    """The rates that every arm tries."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Seeds of these runs; none of the study's."""

    @property
    def limits(self) -> tuple[int, int]:
        """Rates of an arm, at the least and at the most."""
        return len(self.lr), len(self.lr)


class Bracket(Settings):
    """A rule that gives each arm a learning rate of its own; "Learning rates" above describes it."""

    rule: Literal["bracket"] = "bracket"
    """The only rule there is."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=3)] = (900, 901, 902)
    """Every rate is tried on each; kept apart from the study's seeds and the pilot's."""
    rates: Annotated[int, Field(ge=LEAST_RATES, le=41)] = 9
    """Most rates of an arm, the same for all arms."""
    pilot: tuple[Seed, ...] = ()
    """Seeds that a pilot of this study has used; neither `seeds` nor `tune.seeds` may have one of them."""

    @property
    def limits(self) -> tuple[int, int]:
        """Rates of an arm, at the least and at the most."""
        return LEAST_RATES, self.rates


def read(given: Any) -> Any:
    """Return `tune` of a study file as one of its kinds: a word, a grid where it lists rates, else a bracket.

    Raises:
        ConfigError: a word that is no rule, or a setting that its kind does not allow.
    """
    if given == "none":
        return None
    if given == "bracket":
        return Bracket()
    if isinstance(given, dict):
        return parse(Tune if "lr" in given else Bracket, given, where="tune")
    if given is not None and not isinstance(given, Settings):
        raise ConfigError(f"tune is {echo(given)}: {RULES} is expected")
    return given


@dataclass(frozen=True, slots=True)
class Trace:
    """How far the tuning of an arm is, worked out from results alone."""

    rounds: Mapping[float, int]
    """Every rate that was asked for, with the round that asked: 0 a grid or the first three of a bracket, then one more
    each, last the two of the refinement."""
    chosen: float | None = None
    """The arm's rate; None while results are missing."""
    bound: bool = False
    """The chosen rate is the smallest or the largest tried: a bound, not an optimum."""
    least: int = 0
    """Rates that the arm will have tried in the end, at the least."""


def follow(
    tune: Tune | Bracket, base: float, quality: Endpoint, results: Callable[[float], Values | None] = lambda rate: None
) -> Trace:
    """Replay an arm's tuning from what is known, so that a study that was killed goes on as if it had not been.

    Args:
        tune: the study's grid or rule.
        base: the base's rate, in the middle of a bracket's first three.
        quality: the endpoint that the best rate is best in.
        results: a rate's quality on each tuning seed; None where a trial has no result yet.
    """
    if isinstance(tune, Bracket):
        return _bracket(base, tune.rates, quality, results)
    rounds = dict.fromkeys(sorted(tune.lr), 0)
    values = {rate: known for rate in rounds if (known := results(rate)) is not None}
    if len(values) < len(rounds):
        return Trace(rounds, least=len(rounds))
    best = best_rate(values, quality)
    return Trace(rounds, best, best in (min(rounds), max(rounds)), len(rounds))


def _bracket(base: float, most: int, quality: Endpoint, results: Callable[[float], Values | None]) -> Trace:
    asked = {halves: 0 for halves in (-2, 0, 2) if rate_at(base, halves) <= HIGHEST}
    refinement = LEAST_RATES - 3
    while True:
        rounds = {rate_at(base, halves): asked[halves] for halves in sorted(asked)}
        known = {halves: results(rate_at(base, halves)) for halves in asked}
        values = {halves: found for halves, found in known.items() if found is not None}
        if len(values) < len(asked):
            return Trace(rounds, least=len(asked) + refinement)
        best, place = best_rate(values, quality), max(asked.values()) + 1
        if not refinement:
            return Trace(rounds, rate_at(base, best), least=len(asked))
        if min(asked) < best < max(asked):
            asked |= {best - 1: place, best + 1: place}
            refinement = 0
            continue
        beyond = best - 2 if best == min(asked) else best + 2
        if len(asked) + 1 + refinement > most or rate_at(base, beyond) > HIGHEST:
            return Trace(rounds, rate_at(base, best), bound=True, least=len(asked))
        asked[beyond] = place


def rate_at(base: float, halves: int) -> float:
    """Return the base rate times 2^(halves/2), at six significant digits, so that files and hashes agree on it."""
    return base if halves == 0 else float(f"{base * 2 ** (halves / 2):.6g}")


def best_rate(rates: Mapping[K, Values], quality: Endpoint) -> K:
    """Return the key of the rate with the best mean quality over its seeds.

    A rate of which any trial diverged loses to every rate that trained; ties go to the smaller rate.
    """

    def key(rate: K) -> tuple[int, float, K]:
        known = [quality.sign * v for v in rates[rate] if v is not None]
        return len(rates[rate]) - len(known), sum(known) / len(known) if known else 0.0, rate

    return min(rates, key=key)
