"""Endpoints: what a study measures, optimises and judges. Each is defined here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

Direction = Literal["minimize", "maximize"]


class Measured(Protocol):
    """One evaluation of a trial, as the training loop and the records have it."""

    @property
    def bpb(self) -> float | None: ...  # noqa: D102
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
    margin: Literal["margin", "min_effect_n_eff"]
    """The study's setting within which two arms count as equal."""
    part: Literal["bpb", "balance"]
    """Where an evaluation has it."""
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
        return evaluation.bpb if self.part == "bpb" else evaluation.balance.get(self.name)

    def margin_of(self, study: Margins) -> float:
        """Return the difference within which a study's arms count as equal."""
        return study.margin if self.margin == "margin" else study.min_effect_n_eff


BPB = Endpoint(
    name="bpb",
    label="bits per byte",
    unit="bits per byte",
    short="bpb",
    better="lower",
    margin="margin",
    part="bpb",
    form=".4f",
)
"""Quality of a language model, on the held-out slice."""
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

ENDPOINTS: dict[str, Endpoint] = {
    endpoint.name: endpoint
    for endpoint in (
        BPB,
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
        Endpoint(
            name="bits_lost",
            label="bits lost",
            short="bits lost",
            better="lower",
            margin="min_effect_n_eff",
            part="balance",
            worst=1.0,
        ),
    )
}
"""Every endpoint by its name. Scores of questions (qa/...) come on top."""

RESTORED = 0.8
"""The least n_eff_frac of a balanced tree."""

if TYPE_CHECKING:
    EndpointName = str
else:
    EndpointName = Literal[tuple(ENDPOINTS)]
"""The name of an endpoint; a study file with another one is refused."""


def endpoints(names: list[str]) -> list[Endpoint]:
    """Return the endpoints of these names."""
    return [ENDPOINTS[name] for name in names]


def unit_of(name: str) -> str:
    """Return the unit of an endpoint or a score, "" where it has none."""
    return ENDPOINTS[name].unit if name in ENDPOINTS else ""


def label_of(name: str) -> str:
    """Return the label of an endpoint, or the name of a score."""
    return ENDPOINTS[name].label if name in ENDPOINTS else name
