"""Endpoints: what a study measures, optimises and judges. Each is defined here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

Direction = Literal["minimize", "maximize"]


class Measured(Protocol):
    """One evaluation of a trial, as the training loop and the records have it."""

    @property
    def bpb(self) -> float | None: ...  # noqa: D102
    @property
    def task(self) -> dict[str, float]: ...  # noqa: D102
    @property
    def balance(self) -> dict[str, float]: ...  # noqa: D102


class Margins(Protocol):
    """The settings of a study that say which differences are too small to matter."""

    @property
    def margin(self) -> float: ...  # noqa: D102
    @property
    def min_effect_n_eff(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One number at the end of a trial."""

    name: str
    """Column of the tables, metric in MLflow, and what a study file calls it."""
    label: str
    """In figures and sentences."""
    unit: str = ""
    """Of a difference, in findings.json."""
    short: str
    """In sentences with a number before it, and in tables."""
    better: Literal["lower", "higher"]
    margin: Literal["margin", "min_effect_n_eff"] | float
    """The study's setting within which two arms count as equal, or that number itself."""
    scale: float = 1.0
    """What that setting is multiplied by, where its unit is another endpoint's."""
    part: Literal["bpb", "task", "balance"]
    """Where an evaluation has it."""
    behind: float = 0.0
    """A run that is worse than the median of its arm by more than this is outlying; 0 where runs have no heavy tail."""
    lateness: float = 0.0
    """How much worse outlying runs are, on average."""
    worst: float | None = None
    """Its worst value; None where that is the untrained model's."""
    form: str = ".3f"
    """Number format."""

    @property
    def sign(self) -> float:
        """1 where less is better, -1 where more is: times this, less is always better."""
        return 1.0 if self.better == "lower" else -1.0

    @property
    def direction(self) -> Direction:
        """Optuna's word for the side that is better."""
        return "minimize" if self.better == "lower" else "maximize"

    @property
    def start(self) -> str:
        """Column of trials.parquet with its value before training."""
        return f"{self.name}_start"

    def value(self, evaluation: Measured) -> float | None:
        """Return its value at an evaluation; None where it was not measured."""
        if self.part == "bpb":
            return evaluation.bpb
        return (evaluation.task if self.part == "task" else evaluation.balance).get(self.name)

    def margin_of(self, study: Margins) -> float:
        """Return the difference within which a study's arms count as equal."""
        return self.scale * (getattr(study, self.margin) if isinstance(self.margin, str) else self.margin)


BPB = Endpoint(
    name="bpb",
    label="bits per byte",
    unit="bits per byte",
    short="bpb",
    better="lower",
    margin="margin",
    part="bpb",
    behind=0.05,
    lateness=0.08,
    form=".4f",
)
"""Quality of a language model, on the held-out slice. Now and then a run learns late and stays behind: 14 of the 138 arm
trials of `confirm`, `restored` and `equal_active` by over 0.05, 0.080 on average, 0.20 at most."""
KBIT_STORED = Endpoint(
    name="kbit_stored",
    label="kbit stored",
    unit="kbit",
    short="kbit",
    better="higher",
    margin="margin",
    part="task",
    worst=0.0,
    form=".2f",
)
"""Quality of a memory of facts: what it knows of all classes, N (log2 C - cross-entropy) / 1000, never under 0."""
UNEXPLAINED = Endpoint(
    name="unexplained",
    label="variance unexplained",
    unit="share of the teacher's variance that a linear map leaves",
    short="unexplained",
    better="lower",
    margin="margin",
    part="task",
    form=".4f",
)
"""Quality of a student: mean squared error on fresh inputs, over what the best linear map leaves."""
ACCURACY = Endpoint(
    name="accuracy",
    label="accuracy",
    unit="share of answers",
    short="accuracy",
    better="higher",
    margin=0.01,
    part="task",
    worst=0.0,
)
NATS = Endpoint(
    name="nats",
    label="held-out nats",
    unit="nats an image",
    short="nats",
    better="lower",
    margin="margin",
    part="task",
    form=".4f",
)
"""Quality of a classifier: cross-entropy on images that training never sees."""
TASK_ENDPOINTS: dict[str, tuple[Endpoint, ...]] = {
    "language": (BPB,),
    "facts": (
        KBIT_STORED,
        Endpoint(
            name="bits_per_param",
            label="bits stored / feed-forward parameter",
            unit="bits a parameter",
            short="bits a parameter",
            better="higher",
            margin=0.05,
            part="task",
            worst=0.0,
        ),
        ACCURACY,
    ),
    "teacher": (UNEXPLAINED,),
    "digits": (NATS, ACCURACY),
}
"""What each kind of task measures beside balance; its quality first."""
N_EFF = Endpoint(
    name="n_eff_frac",
    label="effective leaves / L",
    unit="share of leaves in effective use",
    short="n_eff",
    better="higher",
    margin="min_effect_n_eff",
    part="balance",
    worst=0.0,
)
"""Balance: every study with trees judges it."""

RESTORED = 0.8
"""The least n_eff_frac of a balanced tree of depth DEPTH."""
DEPTH = 6
"""The depth at which bits lost are said in effective leaves."""


def equivalent(bits_lost: float) -> float:
    """Return the n_eff_frac of a tree of depth DEPTH that loses this share of its bits."""
    return float(2 ** (-DEPTH * bits_lost))


def most_lost(n_eff_frac: float) -> float:
    """Return the share of its bits that a tree of depth DEPTH with this n_eff_frac loses."""
    return -math.log2(n_eff_frac) / DEPTH


BITS_LOST = Endpoint(
    name="bits_lost",
    label="bits lost",
    unit="share of the routing's bits lost",
    short="bits lost",
    better="lower",
    margin="min_effect_n_eff",
    scale=1 / (RESTORED * DEPTH * math.log(2)),
    part="balance",
    worst=1.0,
    form=".4f",
)
"""Balance where depth varies: what each level of a tree loses compares across depths, n_eff_frac does not. Its margin is
that of n_eff_frac, in the bits that it is worth at RESTORED and DEPTH: 0.015 for 0.05."""
EQUIVALENT = Endpoint(
    name="n_eff_6",
    label=f"effective leaves / L at depth {DEPTH} for the same bits lost",
    short=f"n_eff at depth {DEPTH}",
    better="higher",
    margin="min_effect_n_eff",
    part="balance",
    worst=0.0,
)
"""Bits lost as a picture shows them; not measured, so not among ENDPOINTS."""

ENDPOINTS: dict[str, Endpoint] = {
    endpoint.name: endpoint
    for endpoint in (
        *(endpoint for of_task in TASK_ENDPOINTS.values() for endpoint in of_task),
        N_EFF,
        Endpoint(
            name="dead_frac",
            label="dead leaves / L",
            unit="share of leaves dead",
            short="dead",
            better="lower",
            margin="min_effect_n_eff",
            part="balance",
            worst=1.0,
        ),
        BITS_LOST,
    )
}
"""Every endpoint by its name. Scores of questions (qa/...) come on top."""

if TYPE_CHECKING:
    EndpointName = str
else:
    EndpointName = Literal[tuple(ENDPOINTS)]
"""The name of an endpoint; a study file with another one is refused."""


def measured_by(kind: str) -> list[Endpoint]:
    """Return the endpoints that trials of a kind of task measure: its own, quality first, then those of balance."""
    return [*TASK_ENDPOINTS[kind], *(e for e in ENDPOINTS.values() if e.part == "balance")]


def quality_of(kind: str) -> Endpoint:
    """Return the endpoint that says how good a model of a kind of task is."""
    return TASK_ENDPOINTS[kind][0]


def endpoints(names: list[str]) -> list[Endpoint]:
    """Return the endpoints of these names."""
    return [ENDPOINTS[name] for name in names]


def unit_of(name: str) -> str:
    """Return the unit of an endpoint or a score, "" where it has none."""
    return ENDPOINTS[name].unit if name in ENDPOINTS else ""


def label_of(name: str) -> str:
    """Return the label of an endpoint, or the name of a score."""
    return ENDPOINTS[name].label if name in ENDPOINTS else name
