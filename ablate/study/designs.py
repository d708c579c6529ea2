"""From a study file to its trials: pure functions that fix every arm and seed before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ablate.config import ConfigError, Dense, Factor, Questions, Scalar, Study, Tree, Trial, digest
from ablate.study.fractions import Fraction, fraction_of

Kind = Literal["arm", "control", "tune", "search"]
Activation = tuple[str, float, str]
"""activation, mirror and gain."""

# Weight of the mixture's load loss, as in Switch (arXiv 2101.03961).
MOE_LOAD_LOSS = 0.01
# Beside bpb and the balance of a trial's end, what a contrast may name; scores of questions come on top.
ENDPOINTS = ("bpb", "n_eff_frac", "dead_frac", "bits_lost")

# A matched size is rounded to whole units; further off than this, the arms would not be a matched comparison.
MATCH_TOLERANCE = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One configuration under study, as changes of the base."""

    label: str
    kind: Literal["arm", "control"]
    changes: Mapping[str, Scalar]
    derived: str = ""
    """What the matching constraint worked out, in words; empty where nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTrial:
    """One training run of the plan."""

    arm: str
    kind: Kind
    seed: int
    trial: Trial
    factors: Mapping[str, Scalar]
    """Dotted field to its value in this trial; None where the field plays no part (tree fields of a dense control)."""

    @property
    def hash(self) -> str:
        """Content hash of the configuration: the trial's name everywhere."""
        return self.trial.hash()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a study will run, fixed and hashed before the first trial."""

    study: Study
    arms: tuple[Arm, ...]
    trials: tuple[PlannedTrial, ...]
    """In the order they are started: learning-rate trials first, then seed by seed over all arms."""
    waiting_for_tune: int
    """Evaluation trials that still wait for their arm's learning rate."""
    notes: tuple[str, ...]
    """What a reader must know: derived sizes, aliases of a fraction."""
    hash: str
    """Of all that decides the outcome: the study without title and notes, and the base it stands on."""
    space: str
    """Of what makes results comparable: design, base, factor names (for a search also their ranges), objectives."""

    @property
    def storage_name(self) -> str:
        """Name of the Optuna study; a changed space starts a new one."""
        return f"{self.study.name}-{self.space}"

    @property
    def total(self) -> int:
        """Trials in the end, those that wait for a learning rate included; for a search its budget of trials or 0."""
        if self.study.design == "search":
            return self.study.budget.trials or 0
        return len(self.trials) + self.waiting_for_tune


def expand(study: Study, learning_rates: Mapping[str, float] | None = None) -> Plan:
    """All arms and trials of a study, each validated.

    Args:
        study: the study file.
        learning_rates: for a study with `tune`, the rate chosen for each arm so far (label to rate); an arm's
            evaluation trials are in the plan once its rate is known. The plan's hash does not depend on it.

    Raises:
        ConfigError: an arm that is not a valid trial, two equal arms, a match that cannot be met, a bad fraction,
            more trials than budget.trials; one line naming the arm and the key.
    """
    _check(study)
    base = study.trial({})
    fraction = fraction_of(study) if study.fraction else None
    arms = () if study.design == "search" else tuple(_distinct(study, _arms(study, base, fraction)))
    _check_contrasts(study, base, arms)
    keys = factor_keys(study)
    trials: list[PlannedTrial] = []
    waiting = 0
    if study.tune:
        rates = sorted(study.tune.lr)
        for seed, arm, lr in itertools.product(study.tune.seeds, arms, rates):
            trials.append(_planned(study, arm, seed, keys, "tune", {"train.lr": lr}))
    for seed, arm in itertools.product(study.seeds, arms):
        if study.tune is None:
            trials.append(_planned(study, arm, seed, keys, arm.kind))
        elif learning_rates and arm.label in learning_rates:
            trials.append(_planned(study, arm, seed, keys, arm.kind, {"train.lr": learning_rates[arm.label]}))
        else:
            waiting += 1
    limit = study.budget.trials
    if study.design != "search" and limit is not None and len(trials) + waiting > limit:
        raise ConfigError(
            f"budget.trials is {limit}: the design has {len(trials) + waiting} trials; raise it or drop levels"
        )
    notes = [f"{arm.label}: {arm.derived}" for arm in arms if arm.derived]
    if fraction:
        notes += fraction.describe()
    return Plan(
        study=study,
        arms=arms,
        trials=tuple(trials),
        waiting_for_tune=waiting,
        notes=tuple(notes),
        hash=digest([study.model_dump(mode="json", exclude={"title", "notes"}), base.model_dump(mode="json")]),
        space=_space(study, base),
    )


def factor_keys(study: Study) -> list[str]:
    """Dotted fields that any factor or named arm changes: one column each in the table of trials."""
    return list(dict.fromkeys([*study.factors, *(key for arm in study.arms.values() for key in arm)]))


def factor_values(trial: Trial, keys: Iterable[str]) -> dict[str, Scalar]:
    """Each field's validated value in a trial; None where the trial's feed-forward has no such field."""
    values: dict[str, Scalar] = {}
    for key in keys:
        section, _, field = key.partition(".")
        absent = section in {"tree", "dense", "moe"} and trial.model.feedforward != section
        values[key] = None if absent else getattr(getattr(trial, section), field)
    return values


def choose_rate(rates: Mapping[float, list[float | None]]) -> tuple[float, bool]:
    """The learning rate with the lowest mean bpb over the tuning seeds, and whether it lies at the edge of those tried.

    A rate of which any trial diverged (None) loses to every rate that trained; ties go to the smaller rate.
    """

    def key(rate: float) -> tuple[int, float, float]:
        known = [v for v in rates[rate] if v is not None]
        return len(rates[rate]) - len(known), sum(known) / len(known) if known else 0.0, rate

    best = min(rates, key=key)
    return best, best in (min(rates), max(rates))


def settings(study: Study, chosen: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Changes of the base for one candidate of a search, matched sizes included. Raises ConfigError."""
    return dict(_matched(study, Arm(label="candidate", kind="arm", changes=chosen)).changes)


def label_of(study: Study, changes: Mapping[str, Scalar]) -> str:
    """Readable name of a configuration: `mirror=1 placement=unit`; with the section where two fields share a name."""
    keys = factor_keys(study)
    fields = [key.partition(".")[2] for key in keys]
    short = {key: field if fields.count(field) == 1 else key for key, field in zip(keys, fields, strict=True)}
    return " ".join(f"{short.get(key, key)}={_text(value)}" for key, value in changes.items())


def _text(value: Scalar) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check(study: Study) -> None:
    if study.design == "confirm" and study.factors:
        raise ConfigError(f"factors: design 'confirm' takes arms only, not {', '.join(study.factors)}")
    if study.design == "search" and (study.arms or study.controls or study.tune):
        named = next(n for n in ("arms", "controls", "tune") if getattr(study, n))
        raise ConfigError(f"{named}: design 'search' has candidates only; put them in a factorial or confirm study")
    if study.fraction and study.design != "factorial":
        raise ConfigError(f"fraction: only design 'factorial' has one, not {study.design!r}")
    if study.tune and "train.lr" in factor_keys(study):
        raise ConfigError("tune: train.lr is a factor of this study, so it cannot be tuned as well; drop one")
    for key, factor in study.factors.items():
        for other in factor.when:
            if other not in study.factors or other == key:
                raise ConfigError(
                    f"factors.{key}.when is {other!r}: it names other factors: {', '.join(study.factors)}"
                )
    _ordered(study.factors)


def _ordered(factors: Mapping[str, Factor]) -> list[str]:
    """Factors in an order where every condition comes before what depends on it."""
    order: list[str] = []
    left = list(factors)
    while left:
        ready = [key for key in left if all(other in order for other in factors[key].when)]
        if not ready:
            raise ConfigError(f"factors.{left[0]}.when: the conditions of {', '.join(left)} go round in a circle")
        order += ready
        left = [key for key in left if key not in ready]
    return order


def exists(factor: Factor, chosen: Mapping[str, Any]) -> bool:
    """Whether a conditional factor exists beside the levels chosen so far."""
    return all(other in chosen and chosen[other] == level for other, level in factor.when.items())


def ordered_factors(study: Study) -> list[tuple[str, Factor]]:
    """Factors with their names, conditions first."""
    return [(key, study.factors[key]) for key in _ordered(study.factors)]


def _arms(study: Study, base: Trial, fraction: Fraction | None) -> list[Arm]:
    arms: list[Arm] = []
    if study.design == "factorial":
        for changes in fraction.runs() if fraction else _grid(study):
            arms.append(_matched(study, Arm(label=label_of(study, changes), kind="arm", changes=changes)))
    if study.design in {"one_at_a_time", "confirm"}:
        arms.append(Arm(label="reference", kind="arm", changes={}))
    if study.design == "one_at_a_time":
        for changes in _one_at_a_time(study, base):
            arms.append(_matched(study, Arm(label=label_of(study, changes), kind="arm", changes=changes)))
    for name, changes in study.arms.items():
        arms.append(_matched(study, Arm(label=name, kind="arm", changes=changes)))
    return arms + _controls(study, base, [_trial(study, arm) for arm in arms])


def _grid(study: Study) -> list[dict[str, Scalar]]:
    runs: list[dict[str, Scalar]] = [{}]
    for key, factor in ordered_factors(study):
        levels = factor.levels or []
        runs = [
            grown for run in runs for grown in ([{**run, key: v} for v in levels] if exists(factor, run) else [run])
        ]
    # Columns in the file's order, whatever the conditions' order was.
    return [{key: run[key] for key in study.factors if key in run} for run in runs]


def _one_at_a_time(study: Study, base: Trial) -> Iterable[dict[str, Scalar]]:
    here = factor_values(base, study.factors)
    for key, factor in study.factors.items():
        needed = {other: level for other, level in factor.when.items() if here[other] != level}
        for level in factor.levels or []:
            if needed or level != here[key]:
                yield {**needed, key: level}


def _controls(study: Study, base: Trial, arms: Iterable[Trial]) -> list[Arm]:
    """Controls of the base's tree: dense ones in the dense section's activation first, then in each that arms have."""
    own = dict.fromkeys(_activation(arm.tree) for arm in arms if arm.model.feedforward == "tree")
    plain = _activation(base.dense)
    found = []
    for control in study.controls:
        if control == "none":
            found.append(Arm(label="dense_none", kind="control", changes={"model.feedforward": "none"}))
        elif control == "moe":
            found.append(_mixture(base))
        else:
            found += [_dense(control, base, plain, other) for other in dict.fromkeys([plain, *own])]
    return found


def _activation(layer: Tree | Dense) -> Activation:
    return layer.activation, float(layer.mirror), layer.gain


def _dense(control: str, base: Trial, plain: Activation, activation: Activation) -> Arm:
    units = base.tree.total_units if control == "total" else base.tree.active_units
    pairs: list[tuple[str, Scalar, Scalar]] = list(
        zip(("activation", "mirror", "gain"), activation, plain, strict=True)
    )
    own = {field: value for field, value, other in pairs if value != other}
    return Arm(
        label=" ".join([f"dense_{control}", *(f"{field}={_text(value)}" for field, value in own.items())]),
        kind="control",
        changes={
            "model.feedforward": "dense",
            "dense.width": units,
            **{f"dense.{field}": value for field, value in own.items()},
        },
        derived=f"dense.width = {units}, the {control} units of the base's tree"
        + (", in an arm's activation" if own else ""),
    )


def _mixture(base: Trial) -> Arm:
    """As many experts as the tree's units make, each as wide as what a token activates of it."""
    tree, (activation, mirror, gain) = base.tree, _activation(base.dense)
    experts = max(2, tree.total_units // tree.active_units)
    return Arm(
        label="moe",
        kind="control",
        changes={
            "model.feedforward": "moe",
            "moe.experts": experts,
            "moe.width": tree.active_units,
            "moe.activation": activation,
            "moe.mirror": mirror,
            "moe.gain": gain,
            "train.load_loss": MOE_LOAD_LOSS,
        },
        derived=f"{experts} experts of {tree.active_units} units, the active units of the base's tree; an outside "
        f"reference with an auxiliary loss (train.load_loss {MOE_LOAD_LOSS:g})",
    )


def _check_contrasts(study: Study, base: Trial, arms: Iterable[Arm]) -> None:
    """Contrasts name arms that exist, and what will be measured. Raises ConfigError."""
    labels = [arm.label for arm in arms]
    asked = [f"qa/{task}/{shots}shot/" for task in base.questions.tasks for shots in base.questions.shots]
    for contrast in study.contrasts:
        for arm in (contrast.arm, contrast.reference):
            if arm not in labels:
                raise ConfigError(f"contrasts: {arm!r} is not one of the arms {', '.join(labels)}")
        if contrast.endpoint not in ENDPOINTS and not contrast.endpoint.startswith(tuple(asked)):
            known = ", ".join([*ENDPOINTS, *(f"{name}acc" for name in asked)])
            raise ConfigError(f"contrasts: endpoint {contrast.endpoint!r} is not measured; this study has {known}")


def _matched(study: Study, arm: Arm) -> Arm:
    """The arm with its dependent size derived so that total or active units equal the base's."""
    shape = {"tree.trees", "tree.depth", "tree.leaf_width", "tree.node_output"}
    if study.match == "none" or not shape & set(arm.changes):
        return arm
    free = next((f for f in ("leaf_width", "trees") if f"tree.{f}" not in arm.changes), None)
    if free is None:
        raise ConfigError(
            f"match is {study.match!r}: arm {arm.label!r} sets both tree.leaf_width and tree.trees; leave one out, "
            f"to be derived"
        )
    target = getattr(study.trial({}).tree, study.match)
    tree = _trial(study, arm).tree
    inner, path = tree.leaves - 1, tree.depth * tree.node_output
    if study.match == "total_units":
        exact = (
            (target / tree.trees - inner) / tree.leaves
            if free == "leaf_width"
            else (target / (inner + tree.leaves * tree.leaf_width))
        )
    else:
        exact = target / tree.trees - path if free == "leaf_width" else target / (path + tree.leaf_width)
    value = max(1, round(exact))
    changes = {**arm.changes, f"tree.{free}": value}
    units = getattr(_trial(study, Arm(label=arm.label, kind=arm.kind, changes=changes)).tree, study.match)
    off = units / target - 1
    if abs(off) > MATCH_TOLERANCE:
        raise ConfigError(
            f"match is {study.match!r}: arm {arm.label!r} comes no closer than {units} units to the base's {target} "
            f"({off:+.0%}, tree.{free} = {value}); within {MATCH_TOLERANCE:.0%} is allowed"
        )
    derived = f"tree.{free} = {value}, for {units} {study.match.replace('_', ' ')} ({off:+.1%} of the base's {target})"
    return Arm(label=arm.label, kind=arm.kind, changes=changes, derived=derived)


def _distinct(study: Study, arms: Iterable[Arm]) -> Iterable[Arm]:
    labels: set[str] = set()
    seen: dict[str, str] = {}
    for arm in arms:
        key = _trial(study, arm).hash()
        if arm.label in labels:
            raise ConfigError(f"arms: two arms are called {arm.label!r}")
        if key in seen:
            raise ConfigError(f"arms: {arm.label!r} is the same configuration as {seen[key]!r}; drop one")
        labels.add(arm.label)
        seen[key] = arm.label
        yield arm


def _planned(
    study: Study, arm: Arm, seed: int, keys: list[str], kind: Kind, more: Mapping[str, Scalar] | None = None
) -> PlannedTrial:
    trial = _trial(study, arm, seed, more)
    if kind == "tune":
        trial = trial.model_copy(update={"questions": Questions()})  # only bpb chooses a rate
    return PlannedTrial(arm=arm.label, kind=kind, seed=seed, trial=trial, factors=factor_values(trial, keys))


def _trial(study: Study, arm: Arm, seed: int = 0, more: Mapping[str, Scalar] | None = None) -> Trial:
    try:
        return study.trial({**arm.changes, **(more or {})}, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"arm {arm.label!r}: {error}") from None


def _space(study: Study, base: Trial) -> str:
    factors: Any = sorted(study.factors)
    if study.design == "search":
        factors = {key: factor.model_dump(mode="json") for key, factor in study.factors.items()}
    return digest([study.design, base.model_dump(mode="json"), factors, study.match, study.objectives])[:8]
