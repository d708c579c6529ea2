"""The arms of an enumerated design: changes of the base, with matched sizes, and the controls beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ablate.config import ConfigError, Dense, Factor, Scalar, Study, Tree, Trial, check_field
from ablate.study.fractions import Fraction
from ablate.study.matching import SHAPE, allowed, derive, derived_field

Activation = tuple[str, float, str]
"""activation, mirror and gain."""

# Weight of the mixture's load loss, as in Switch (arXiv 2101.03961).
MOE_LOAD_LOSS = 0.01
# So many trials are built before the budget is looked at, which then knows their exact number.
FEW_TRIALS = 10_000
MOST_TRIALS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One configuration under study, as changes of the base."""

    label: str
    kind: Literal["arm", "control"]
    changes: Mapping[str, Scalar]
    derived: str = ""
    """What the matching constraint worked out, in words; empty where nothing."""


def factor_keys(study: Study) -> list[str]:
    """Dotted fields that any factor or named arm changes: one column each in the table of trials."""
    return list(dict.fromkeys([*study.factors, *(key for arm in study.arms.values() for key in arm)]))


def factor_values(trial: Trial, keys: Iterable[str]) -> dict[str, Scalar]:
    """Each field's validated value in a trial; None where the trial's feed-forward has no such field."""
    values: dict[str, Scalar] = {}
    for key in keys:
        section = key.partition(".")[0]
        absent = section in {"tree", "dense", "moe"} and trial.model.feedforward != section
        values[key] = None if absent else trial.value(key)
    return values


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


def order_of(factors: Mapping[str, Factor]) -> list[str]:
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
    return all(
        other in chosen and check_field(other, chosen[other]) == check_field(other, level)
        for other, level in factor.when.items()
    )


def ordered_factors(study: Study) -> list[tuple[str, Factor]]:
    """Factors with their names, conditions first."""
    return [(key, study.factors[key]) for key in order_of(study.factors)]


def arms_of(study: Study, base: Trial, fraction: Fraction | None) -> list[Arm]:
    """Return the arms of an enumerated design, its controls last; raises ConfigError for one that cannot be."""
    arms: list[Arm] = []
    if study.design == "factorial":
        if fraction:
            _refuse_too_many(study, 2 ** (len(fraction.levels) - len(fraction.generators)))
        for changes in fraction.runs() if fraction else _grid(study):
            arms.append(matched(study, Arm(label=label_of(study, changes), kind="arm", changes=changes)))
    if study.design in {"one_at_a_time", "confirm"}:
        arms.append(Arm(label="reference", kind="arm", changes={}))
    if study.design == "one_at_a_time":
        for changes in _one_at_a_time(study, base):
            arms.append(matched(study, Arm(label=label_of(study, changes), kind="arm", changes=changes)))
    for name, changes in study.arms.items():
        arms.append(matched(study, Arm(label=name, kind="arm", changes=changes)))
    return arms + _controls(study, base, [trial_of(study, arm) for arm in arms])


def _grid(study: Study) -> list[dict[str, Scalar]]:
    runs: list[dict[str, Scalar]] = [{}]
    for key, factor in ordered_factors(study):
        levels = factor.levels or []
        _refuse_too_many(study, sum(len(levels) if exists(factor, run) else 1 for run in runs))
        runs = [
            grown for run in runs for grown in ([{**run, key: v} for v in levels] if exists(factor, run) else [run])
        ]
    # Columns in the file's order, whatever the conditions' order was.
    return [{key: run[key] for key in study.factors if key in run} for run in runs]


def _refuse_too_many(study: Study, arms: int) -> None:
    """Refuse a design before its arms are built where they would be more than its budget, and more than a few seconds' work.

    Raises:
        ConfigError: the design has too many arms.
    """
    trials = arms * (len(study.seeds) + (study.tune.limits[0] * len(study.tune.seeds) if study.tune else 0))
    budget = study.budget.trials
    if budget is not None and trials > max(budget, FEW_TRIALS):
        raise ConfigError(f"budget.trials is {budget}: the design has {trials:,} trials or more; drop levels")
    if trials > MOST_TRIALS:
        raise ConfigError(f"factors: the design has {trials:,} trials or more, at most {MOST_TRIALS:,} are possible")


def _one_at_a_time(study: Study, base: Trial) -> Iterable[dict[str, Scalar]]:
    here = factor_values(base, study.factors)
    for key, factor in study.factors.items():
        needed = {other: level for other, level in factor.when.items() if here[other] != check_field(other, level)}
        for level in factor.levels or []:
            if needed or check_field(key, level) != here[key]:
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


def matched(study: Study, arm: Arm) -> Arm:
    """Return the arm with its derived size, so that its total or active units equal the base's.

    Raises:
        ConfigError: both sizes are set, or no whole number of units comes close enough.
    """
    if study.match == "none" or not set(SHAPE) & set(arm.changes):
        return arm
    field = derived_field(study.match, arm.changes, f"arm {arm.label!r}")
    target = getattr(study.trial({}).tree, study.match)
    found = derive(study.match, target, trial_of(study, arm).tree, field)
    if not found.close:
        least, most = allowed(target)
        raise ConfigError(
            f"match is {study.match!r}: arm {arm.label!r} comes no closer to the base's {target} units than "
            f"{found.units} (tree.{field} = {found.value}); {least} to {most} are allowed"
        )
    units = f"{found.units} {study.match.replace('_', ' ')} ({found.off:+.1%} of the base's {target})"
    changes = {**arm.changes, f"tree.{field}": found.value}
    return Arm(label=arm.label, kind=arm.kind, changes=changes, derived=f"tree.{field} = {found.value}, for {units}")


def distinct(study: Study, arms: Iterable[Arm]) -> Iterable[Arm]:
    """Yield the arms; raises ConfigError for two of one name or of one configuration."""
    labels: set[str] = set()
    seen: dict[str, str] = {}
    for arm in arms:
        key = trial_of(study, arm).hash()
        if arm.label in labels:
            raise ConfigError(f"arms: two arms are called {arm.label!r}")
        if key in seen:
            raise ConfigError(f"arms: {arm.label!r} is the same configuration as {seen[key]!r}; drop one")
        labels.add(arm.label)
        seen[key] = arm.label
        yield arm


def trial_of(study: Study, arm: Arm, seed: int = 0, more: Mapping[str, Scalar] | None = None) -> Trial:
    """Return an arm's complete configuration; raises ConfigError that names the arm."""
    try:
        return study.trial({**arm.changes, **(more or {})}, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"arm {arm.label!r}: {error}") from None
