"""What only a search has: the sampler of its candidates, and its finalists."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ablate.config.section import Settings
from ablate.config.settings import Positive, Seed

SAMPLERS = {
    "tpe": {"startup", "multivariate"},
    "cmaes": {"startup", "population"},
    "gp": {"startup"},
    "nsga2": {"population"},
    "qmc": set[str](),
    "random": set[str](),
}
"""Optuna's samplers, and the settings beside `seed` that each takes."""


class Sampler(Settings):
    """What proposes the candidates of a search: one of Optuna's samplers."""

    name: Literal["tpe", "cmaes", "gp", "nsga2", "qmc", "random"] = "tpe"
    """Tree of Parzen estimators, CMA-ES, Gaussian process, genetic, quasi-random or random."""
    seed: Seed = 0
    """Of the sampler's own random numbers."""
    startup: Positive | None = None
    """tpe, cmaes, gp: candidates drawn at random before the sampler learns; Optuna's default where not given."""
    multivariate: bool = False
    """tpe: model factors together instead of one by one."""
    population: Annotated[int, Field(ge=2, le=10_000)] | None = None
    """cmaes, nsga2: candidates of one generation; Optuna's default where not given."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for field in ("startup", "multivariate", "population"):
            if getattr(self, field) and field not in SAMPLERS[self.name]:
                takers = ", ".join(name for name, fields in SAMPLERS.items() if field in fields)
                raise ValueError(f"{field} is {getattr(self, field)}: sampler {self.name!r} has none; {takers} do")
        return self


class Finalists(Settings):
    """The best candidates of a search run again on fresh seeds, because the best of many looks better than it is."""

    count: Annotated[int, Field(ge=0, le=10_000)] = 3
    """0: none, and the search names nothing."""
    seeds: tuple[Seed, ...] = ()
    """Seeds that the race does not use; as many as it has, right after its largest, where not given."""
