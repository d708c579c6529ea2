"""A study file: the factors under study, the design that enumerates or searches them, and its limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ablate.config.endpoints import (
    BPB,
    TASK_ENDPOINTS,
    Endpoint,
    EndpointName,
    endpoints,
    measured_by,
    quality_of,
)
from ablate.config.errors import ConfigError, echo
from ablate.config.presets import PRESETS, Preset
from ablate.config.search import Finalists, Sampler
from ablate.config.section import Section, Settings, no_switch, parse
from ablate.config.settings import Dense, Mixture, Model, Positive, Seed, Train, Tree, Trial
from ablate.config.task import Task, kind_of
from ablate.config.tune import Bracket, Tune
from ablate.config.tune import read as read_tune


class Levels(Settings):
    """A factor given as a range, for a search."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Sample on a logarithmic scale."""
    integer: bool = False
    """Whole numbers only; a field that takes no others needs it not."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low}: it must be under high = {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}: a log range needs it above 0")
        return self


Scalar = bool | int | float | str | None


class Factor(Settings):
    """One choice under study: a field of Tree, Model, Dense, Mixture, Train or Task, with its levels or range."""

    levels: Annotated[list[Scalar], Field(min_length=1)] | None = None
    """The values to compare."""
    range: Levels | None = None
    """`search`: an interval of values, in place of levels."""
    when: dict[str, Scalar] = {}
    """The factor exists only where these other factors have these levels; elsewhere the base's value is used."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.levels is None) == (self.range is None):
            raise ValueError("levels is missing: a factor has either levels or a range")
        return self


class Contrast(Settings):
    """A comparison named before the first trial: an arm against the reference arm, one endpoint."""

    arm: str
    """An arm's name."""
    reference: str = "reference"
    """The arm that it is compared with; `reference` is the base without changes."""
    endpoint: str = BPB.name
    """What is compared: bpb, n_eff_frac, dead_frac or bits_lost."""
    claim: Literal["lower", "higher", "matches"]
    """What the arm's value should be against the reference's."""
    margin: Annotated[float, Field(gt=0)]
    """Smallest difference that counts, in the endpoint's unit; `matches` means within it."""


class Budget(Settings):
    """When a search ends; the first limit that is reached counts. Enumerated designs take `trials` as an upper check."""

    trials: Positive | None = None
    """Training runs, a search's finalists included."""
    tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    """Training tokens of all runs together."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of all runs together."""


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Of a study: it names files and folders."""
# Names that a study cannot have, and why.
RESERVED = {"compare": "out/compare holds comparisons of studies", "default": "MLflow's own experiment"}
# Settings that no other design takes, added after the first plans were published.
SEARCH_ONLY = ("sampler", "race", "finalists", "enqueue", "warm_start")


class Study(Settings):
    """One study file."""

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    """The file's name without .yaml, where not given; letters, digits, `.`, `_` and `-`."""
    title: str = ""
    """Heading of the report."""
    notes: str = ""
    """What a reader of the report should know first."""
    design: Literal["search", "factorial", "one_at_a_time", "confirm"] = "factorial"
    """How the arms follow from the factors; see above."""
    preset: Preset = "nano"
    """Sizes that the base starts from; the last table lists them."""
    base: dict[str, Any] = {}
    """Sections of a trial (task, corpus, model, tree, dense, moe, train, questions), over the preset."""
    factors: dict[str, Factor] = {}
    """Dotted field (tree.mirror) to its levels; a plain list of levels is enough."""
    fraction: list[str] = []
    """Two-level fractional factorial: generators such as 'tree.gain = tree.mirror * tree.placement'."""
    arms: dict[str, dict[str, Scalar]] = {}
    """Named arms, as changes of the base; in `confirm` and beside the grid of a factorial."""
    contrasts: list[Contrast] = []
    """`confirm` only."""
    controls: list[Literal["total", "active", "none", "moe"]] = []
    """Beside the arms: dense models of equal total or equal active units, each in the dense section's activation and in
    every other one that an arm has; no feed-forward at all; a top-1 mixture of experts (which has a load loss)."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2]
    """Every arm runs once on each; a seed sets the initialisation and the order of the data."""
    match: Literal["total_units", "active_units", "none"] = "none"
    """Keep this number of units equal to the base's in every arm that changes the trees' shape."""
    tune: Tune | Bracket | None = None
    """How arms get their learning rates: none is one rate for all (the base's), bracket a rule that finds each arm's own;
    a mapping with lr is a grid of rates."""
    objectives: Annotated[list[EndpointName], Field(min_length=1)] = [BPB.name]
    """`search`: the endpoints to make better; with several it looks for the best trade-offs."""
    pruner: Literal["halving", "median"] | None = None
    """`search` with one objective: end a candidate's first run early where it lags behind others at the same step."""
    budget: Budget = Budget()
    """`search` needs one of its limits."""
    sampler: Sampler = Sampler()
    """`search`: its name is enough."""
    race: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """`search`: level of the one-sided test that ends a candidate before it has had all seeds; 0 gives every candidate
    all of them."""
    finalists: Finalists = Finalists()
    """`search` only."""
    enqueue: list[dict[str, Scalar]] = []
    """`search`: candidates that are tried first, each with a level for every factor."""
    warm_start: str | None = None
    """`search`: an earlier search of the same factors, shown to the sampler before the first candidate."""
    margin: Annotated[float, Field(gt=0)] = 0.01
    """Difference in the task's quality (bpb of a language model) within which two arms count as equal; a task other than
    language has no default."""
    min_effect_n_eff: Annotated[float, Field(gt=0)] = 0.05
    """n_eff_frac within which two arms count as equally balanced."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("factors"), dict):
            short = {k: {"levels": v} if isinstance(v, list) else v for k, v in data["factors"].items()}
            data = {**data, "factors": short}
        if isinstance(data, dict) and isinstance(data.get("sampler"), str):
            data = {**data, "sampler": {"name": data["sampler"]}}
        if isinstance(data, dict) and "tune" in data:
            data = {**data, "tune": read_tune(data["tune"])}
        return _with_quality(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.name.lower() in RESERVED:
            raise ValueError(f"name is {self.name!r}: it is taken ({RESERVED[self.name.lower()]}); choose another")
        if self.pruner and len(self.objectives) > 1:
            raise ValueError(
                f"pruner is {self.pruner!r}: with {len(self.objectives)} objectives no trial can be pruned; drop one"
            )
        if self.pruner and self.design != "search":
            raise ValueError(f"pruner is {self.pruner!r}: only design 'search' prunes")
        self._measured()
        _once("seeds", self.seeds)
        _once("objectives", self.objectives)
        _once("finalists.seeds", self.finalists.seeds)
        self._tuned()
        if self.design == "search" and not (self.budget.trials or self.budget.tokens or self.budget.hours):
            raise ValueError("budget is missing: design 'search' needs budget.trials, budget.tokens or budget.hours")
        self._search()
        if self.design in {"search", "factorial", "one_at_a_time"} and not self.factors:
            raise ValueError(f"factors is missing: design {self.design!r} needs at least one")
        if self.design != "search":
            for key, factor in self.factors.items():
                if factor.range is not None:
                    raise ValueError(f"factors.{key}.range: design {self.design!r} needs levels")
        if self.design == "confirm" and not (self.arms and self.contrasts):
            raise ValueError("contrasts is missing: design 'confirm' needs arms and contrasts")
        if self.contrasts and self.design != "confirm":
            raise ValueError(f"contrasts: only design 'confirm' has them, not {self.design!r}")
        for name in self.arms:
            if not (name.strip() and name.isprintable()):
                raise ValueError(f"arms: {echo(name)} is no name: printable characters in one line are expected")
        for key in [*self.factors, *(k for a in self.arms.values() for k in a)]:
            _field(key)
        self._levels()
        self.trial({})
        return self

    def _tuned(self) -> None:
        """Check that rates are tuned on seeds that nothing else uses."""
        if self.tune is None:
            return
        seeds, pilot = list(self.tune.seeds), []
        if isinstance(self.tune, Tune):
            _once("tune.lr", self.tune.lr)
        else:
            pilot = list(self.tune.pilot)
        _once("tune.seeds", seeds)
        for name, own, other, others in (
            ("tune.seeds", seeds, "seeds", self.seeds),
            ("tune.seeds", seeds, "tune.pilot", pilot),
            ("seeds", self.seeds, "tune.pilot", pilot),
        ):
            if set(own) & set(others):
                raise ValueError(f"{name} is {echo(own)}: they must differ from {other} = {echo(others)}")

    def _measured(self) -> None:
        """Check that the task measures what is optimised, and that its margin was chosen."""
        kind = self.task
        if kind not in TASK_ENDPOINTS:
            return  # the trial's own check says which there are
        known = [endpoint.name for endpoint in measured_by(kind)]
        for name in self.objectives:
            if name not in known:
                raise ValueError(f"objectives is {self.objectives}: task {kind!r} measures {', '.join(known)}")
        if kind != "language" and "margin" not in self.model_fields_set:
            raise ValueError(
                f"margin is missing: task {kind!r} is judged in {quality_of(kind).label}; say which difference is too "
                f"small to matter"
            )

    def _levels(self) -> None:
        """Check that no factor has one level in two spellings, and that conditions name levels that exist."""
        settled: dict[str, dict[Any, Scalar]] = {}
        for key, factor in self.factors.items():
            known: dict[Any, Scalar] = {}
            for level in factor.levels or []:
                value = check_field(key, level)
                if value in known:
                    both = (repr(known[value]), repr(level))
                    same = "" if both[0] == both[1] else f": {both[0]} and {both[1]} are one value"
                    raise ValueError(f"factors.{key}: levels is {echo(factor.levels)}: a level is listed twice{same}")
                known[value] = level
            settled[key] = known
        for key, factor in self.factors.items():
            for other, level in factor.when.items():
                if other not in self.factors:
                    continue  # `expand` says which there are
                value, bounds = check_field(other, level), self.factors[other].range
                if value not in settled[other] and not (bounds and bounds.low <= value <= bounds.high):
                    raise ValueError(f"factors.{key}.when is {echo(factor.when)}: {other} never is {echo(level)}")

    def _search(self) -> None:
        """Check what only a search has."""
        if self.design != "search":
            for name in SEARCH_ONLY:
                if getattr(self, name) != Study.model_fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"{name}: only design 'search' has it, not {self.design!r}")
            return
        if set(self.finalist_seeds) & set(self.seeds):
            raise ValueError(f"finalists.seeds is {self.finalist_seeds}: they must differ from seeds = {self.seeds}")

    @property
    def task(self) -> str:
        """The kind of task that its trials have."""
        return kind_of(self.base, PRESETS[self.preset])

    @property
    def quality(self) -> Endpoint:
        """The endpoint that says how good a trained model of this study is."""
        return quality_of(self.task)

    @property
    def goals(self) -> list[Endpoint]:
        """The endpoints of the objectives."""
        return endpoints(self.objectives)

    @property
    def finalist_seeds(self) -> list[int]:
        """Seeds on which the finalists of a search run."""
        if not self.finalists.count:
            return []
        first = max(self.seeds) + 1
        return list(self.finalists.seeds) or list(range(first, first + len(self.seeds)))

    @property
    def racing_trials(self) -> int:
        """Training runs that a search's budget leaves for racing, when its finalists have theirs."""
        return (self.budget.trials or 0) - self.finalists.count * len(self.finalist_seeds)

    def settled(self) -> dict[str, Any]:
        """Return all that decides the outcome, as plain data for hashes.

        What only a search has is left out at its default, so that hashes of plans stay as published.
        """
        kept = self.model_dump(mode="json", exclude={"title", "notes"})
        if self.design != "search":
            for name in SEARCH_ONLY:
                del kept[name]
        return kept

    def trial(self, changes: dict[str, Any], *, seed: int = 0) -> Trial:
        """The complete configuration of the base with dotted changes; both seeds are `seed`. Raises ConfigError."""
        merged: dict[str, Any] = {k: dict(v) for k, v in PRESETS[self.preset].items()}
        for name, section in self.base.items():
            if not isinstance(section, dict):
                raise ConfigError(
                    f"base.{echo(name)[1:-1]} is {echo(section)}: a section with its settings is expected"
                )
            merged[name] = {**merged.get(name, {}), **section}
        for key, value in changes.items():
            section, field = _field(key)
            merged.setdefault(section, {})[field] = value
        return parse(Trial, {**merged, "init_seed": seed, "data_seed": seed}, where="base")


def _with_quality(data: dict[str, Any]) -> dict[str, Any]:
    """Return a study's plain data with its task's quality where an endpoint is left out, for tasks other than language."""
    preset = data.get("preset", Study.model_fields["preset"].default)
    kind = kind_of(data.get("base"), PRESETS[preset] if isinstance(preset, str) and preset in PRESETS else {})
    if kind not in TASK_ENDPOINTS or kind == "language":
        return data
    name = quality_of(kind).name
    named = data.get("contrasts")
    if isinstance(named, list):
        data = {**data, "contrasts": [{"endpoint": name, **c} if isinstance(c, dict) else c for c in named]}
    return {"objectives": [name], **data}


def _sections() -> dict[str, type[Section]]:
    return {"tree": Tree, "model": Model, "dense": Dense, "moe": Mixture, "train": Train, "task": Task}


def factor_fields() -> list[str]:
    """Return the dotted names of all fields that can be factors."""
    return [f"{section}.{field}" for section, kind in _sections().items() for field in kind.model_fields]


def _field(key: str) -> tuple[str, str]:
    """Return section and field of a dotted factor name; raises ConfigError with the names that exist."""
    if key == "task.kind":
        raise ConfigError("factor 'task.kind' is none: trials of one study have one task")
    section, _, field = key.partition(".")
    sections = _sections()
    if section not in sections:
        raise ConfigError(
            f"factor {echo(key)} is unknown: it starts with one of {', '.join(s + '.' for s in sections)}"
        )
    if field not in sections[section].model_fields:
        raise ConfigError(f"factor {echo(key)} is unknown: {section} has {', '.join(sections[section].model_fields)}")
    return section, field


def check_field(key: str, value: Any) -> Any:
    """Return a dotted field's value as a trial will hold it; the rest of its section is not looked at.

    Raises:
        ConfigError: the field does not allow the value.
    """
    try:
        return _adapter(key).validate_python(value)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(f"factors.{key} is {echo(value)}: {message[0].lower()}{message[1:]}") from None


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    section, field = _field(key)
    kind = _sections()[section]
    info = kind.model_fields[field]
    switch = BeforeValidator(partial(no_switch, kind, field))
    annotation: Any = Annotated[(info.annotation, *info.metadata, switch)]
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def _once(name: str, values: Sequence[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{name} is {echo(list(values))}: {value!r} is listed twice")


def integer_field(key: str) -> bool:
    """Return whether a dotted field takes whole numbers only."""
    section, field = _field(key)
    annotation = _sections()[section].model_fields[field].annotation
    return annotation is int or (int in get_args(annotation) and float not in get_args(annotation))
