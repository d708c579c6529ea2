"""From a study file to its trials: pure functions that fix every arm and seed before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ablate.config import ConfigError, Questions, Scalar, Study, Trial, digest
from ablate.config.endpoints import measured_by
from ablate.config.tune import Trace, follow
from ablate.results.record import Kind
from ablate.study.arms import Arm, arms_of, distinct, factor_keys, factor_values, order_of, trial_of
from ablate.study.fractions import fraction_of
from ablate.study.samplers import check
from ablate.study.space import Space


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTrial:
    """One training run of the plan."""

    arm: str
    kind: Kind
    seed: int
    trial: Trial
    factors: Mapping[str, Scalar]
    """Dotted field to its value in this trial; None where the field plays no part (tree fields of a dense control)."""
    hash: str = field(init=False)
    """Content hash of the configuration: the trial's name everywhere."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hash", self.trial.hash())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a study will run, fixed and hashed before the first trial."""

    study: Study
    arms: tuple[Arm, ...]
    trials: tuple[PlannedTrial, ...]
    """In the order they are started: learning-rate trials first, then seed by seed over all arms."""
    waiting_for_tune: int
    """Evaluation trials that still wait for their arm's learning rate."""
    tuning: tuple[int, int]
    """Tuning trials in the end, at the least and at the most; a bracket ends where its arm's best rate lies inside."""
    notes: tuple[str, ...]
    """What a reader must know: derived sizes, aliases of a fraction."""
    hash: str
    """Of all that decides the outcome: the study without title and notes, and its base."""
    space: str
    """Of what makes results comparable: design, base, factor names (for a search also their ranges), objectives."""

    @property
    def racing(self) -> bool:
        """Whether this is a search whose finalists are not chosen yet."""
        return self.study.design == "search" and not self.trials

    @property
    def storage_name(self) -> str:
        """Name of the Optuna study; a changed space starts a new one, and finalists have one of their own."""
        finals = self.study.design == "search" and bool(self.trials)
        return f"{self.study.name}-{self.space}{'-finalists' if finals else ''}"

    @property
    def total(self) -> int:
        """Trials in the end, at the least, those that wait for a learning rate included; a search's budget or 0."""
        if self.study.design == "search":
            return self.study.budget.trials or 0
        return len(self.trials) + self.waiting_for_tune + self.tuning[0] - self.tuned

    @property
    def tuned(self) -> int:
        """Tuning trials of the plan so far."""
        return sum(t.kind == "tune" for t in self.trials)

    @property
    def tuning_text(self) -> str:
        """What tuning costs, in words; empty where learning rates are not tuned."""
        if self.study.tune is None:
            return ""
        rates, seeds = _span(self.study.tune.limits), len(self.study.tune.seeds)
        return f"learning rates: {_span(self.tuning)} of the trials tune them ({rates} rates an arm on {seeds} seeds)"


def _span(limits: tuple[int, int]) -> str:
    return f"{limits[0]}" if limits[0] == limits[1] else f"{limits[0]} to {limits[1]}"


def expand(study: Study, traces: Mapping[str, Trace] | None = None, finalists: Iterable[PlannedTrial] = ()) -> Plan:
    """Build all arms and trials of a study, each validated.

    Args:
        study: the study file.
        traces: for a study with `tune`, how far the tuning of each arm is (label to trace); an arm's evaluation trials
            are in the plan once its rate is known. The plan's hash does not depend on it.
        finalists: for a search whose race is over, the trials of its best candidates on fresh seeds.

    Raises:
        ConfigError: an arm that is not a valid trial, two equal arms, a match that cannot be met, a bad fraction,
            more trials than budget.trials; one line naming the arm and the key.
    """
    _check(study)
    base = study.trial({})
    fraction = fraction_of(study) if study.fraction else None
    arms = () if study.design == "search" else tuple(distinct(study, arms_of(study, base, fraction)))
    _check_contrasts(study, base, arms)
    keys = factor_keys(study)
    trials: list[PlannedTrial] = list(finalists)
    waiting = 0
    known = _traces(study, base, arms, traces or {})
    if study.tune:
        for seed, arm in itertools.product(study.tune.seeds, arms):
            trials += [tuning_trial(study, arm, seed, lr, keys) for lr in known[arm.label].rounds]
    for seed, arm in itertools.product(study.seeds, arms):
        if study.tune is None:
            trials.append(_planned(study, arm, seed, keys, arm.kind))
        elif (lr := known[arm.label].chosen) is not None:
            trials.append(_planned(study, arm, seed, keys, arm.kind, {"train.lr": lr}))
        else:
            waiting += 1
    tuning = _tuning(study, known.values())
    limit, whole = study.budget.trials, tuning[1] + len(arms) * len(study.seeds)
    if study.design != "search" and limit is not None and whole > limit:
        words = "up to " if tuning[0] < tuning[1] else ""
        raise ConfigError(f"budget.trials is {limit}: the design has {words}{whole} trials; raise it or drop levels")
    notes = [f"{arm.label}: {arm.derived}" for arm in arms if arm.derived]
    if study.design == "search":
        notes += _search_notes(study, base)
    if fraction:
        notes += fraction.describe()
    return Plan(
        study=study,
        arms=arms,
        trials=tuple(trials),
        waiting_for_tune=waiting,
        tuning=tuning,
        notes=tuple(notes),
        hash=digest([study.settled(), base.model_dump(mode="json")]),
        space=_space(study, base),
    )


def one_of_each(plan: Plan) -> list[tuple[str, Trial]]:
    """Return each arm's name with a trial of it, of a search the base: seeds and learning rates change nothing of their size."""
    known = {planned.arm: planned.trial for planned in plan.trials}
    named = {arm.label: known.get(arm.label) or plan.study.trial(dict(arm.changes)) for arm in plan.arms}
    return list(named.items()) or [("the base", plan.study.trial({}))]


def _traces(study: Study, base: Trial, arms: Iterable[Arm], known: Mapping[str, Trace]) -> dict[str, Trace]:
    """Return how far the tuning of every arm is; arms that are not in `known` are at its beginning."""
    if study.tune is None:
        return {}
    return {arm.label: known.get(arm.label) or follow(study.tune, base.train.lr, study.quality) for arm in arms}


def _tuning(study: Study, known: Iterable[Trace]) -> tuple[int, int]:
    """Return the tuning trials of a study in the end, at the least and at the most."""
    if study.tune is None:
        return 0, 0
    most, rates = study.tune.limits[1], list(known)
    highest = sum(most if trace.chosen is None else trace.least for trace in rates)
    return sum(trace.least for trace in rates) * len(study.tune.seeds), highest * len(study.tune.seeds)


def _check(study: Study) -> None:
    if study.design == "confirm" and study.factors:
        raise ConfigError(f"factors: design 'confirm' takes arms only, not {', '.join(study.factors)}")
    if study.design == "search" and (study.arms or study.controls or study.tune):
        named = next(n for n in ("arms", "controls", "tune") if getattr(study, n))
        if named == "tune":
            raise ConfigError(
                "tune: in design 'search' the learning rate is a dimension; put train.lr among the factors"
            )
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
    order_of(study.factors)


def _search_notes(study: Study, base: Trial) -> list[str]:
    """Check the space, the sampler and the candidates that the file names; return what a reader must know of them."""
    if study.budget.trials is not None and study.racing_trials < 1:
        count, seeds = study.finalists.count, len(study.finalist_seeds)
        raise ConfigError(
            f"budget.trials is {study.budget.trials}: {count * seeds} of them are for {count} finalists on {seeds} fresh "
            f"seeds each, which leaves none for the search; raise it or lower finalists.count"
        )
    space = Space(study)
    check(study, space)
    for place, chosen in enumerate(study.enqueue):
        space.read(chosen, f"enqueue.{place}")
    notes = list(space.notes)
    if space.derived:
        notes.append(f"{space.derived} follows from the other sizes, for equal {study.match.replace('_', ' ')}")
    if "train.lr" not in study.factors:
        notes.append(f"train.lr is {base.train.lr:g} for every candidate: shapes that need another rate lose by it")
    return notes


def _check_contrasts(study: Study, base: Trial, arms: Iterable[Arm]) -> None:
    """Contrasts name arms that exist, and what will be measured. Raises ConfigError."""
    labels = [arm.label for arm in arms]
    measured = [endpoint.name for endpoint in measured_by(study.task)]
    asked = [f"qa/{task}/{shots}shot/" for task in base.questions.tasks for shots in base.questions.shots]
    for contrast in study.contrasts:
        for arm in (contrast.arm, contrast.reference):
            if arm not in labels:
                raise ConfigError(f"contrasts: {arm!r} is not one of the arms {', '.join(labels)}")
        if contrast.endpoint not in measured and not contrast.endpoint.startswith(tuple(asked)):
            known = ", ".join([*measured, *(f"{name}acc" for name in asked)])
            raise ConfigError(f"contrasts: endpoint {contrast.endpoint!r} is not measured; this study has {known}")


def tuning_trial(study: Study, arm: Arm, seed: int, lr: float, keys: list[str]) -> PlannedTrial:
    """Return the training run that tries a rate for an arm."""
    return _planned(study, arm, seed, keys, "tune", {"train.lr": lr})


def _planned(
    study: Study, arm: Arm, seed: int, keys: list[str], kind: Kind, more: Mapping[str, Scalar] | None = None
) -> PlannedTrial:
    trial = trial_of(study, arm, seed, more)
    if kind == "tune":
        trial = trial.model_copy(update={"questions": Questions()})  # only quality chooses a rate
    return PlannedTrial(arm=arm.label, kind=kind, seed=seed, trial=trial, factors=factor_values(trial, keys))


def _space(study: Study, base: Trial) -> str:
    if study.design != "search":
        return digest(
            [study.design, base.model_dump(mode="json"), sorted(study.factors), study.match, study.objectives]
        )[:8]
    factors = {key: factor.model_dump(mode="json") for key, factor in study.factors.items()}
    parts = [study.design, base.model_dump(mode="json"), factors, study.match, study.objectives, study.seeds]
    return digest(parts)[:8]
