"""What one trial gives back: plain data, written once as JSON beside a parquet table of leaf usage."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field

from ablate.config import Section, Trial
from ablate.evaluation.scores import Score
from ablate.model.counts import Cost

Status = Literal["finished", "diverged", "pruned", "killed"]


class Evaluation(Section):
    """One evaluation on the fixed held-out slice."""

    step: int
    """Optimizer steps done before it."""
    tokens: int
    """Training tokens seen before it."""
    bpb: float | None
    """Bits per byte of a language model; None where the loss was not finite, and for other tasks."""
    train_loss: float | None
    """Mean training loss (nats a token; squared error of a student) since the previous evaluation; None at step 0."""
    lr: float
    seconds: float
    """Training seconds so far, evaluations excluded."""
    task: dict[str, float] = Field(default_factory=dict)
    """Endpoints of another task than language, by name; empty where the loss was not finite."""
    balance: dict[str, float] = Field(default_factory=dict)
    """Balance metrics (balance.metrics.summary): `name` mean over trees and layers, `name_worst`, `layer<i>/name`."""


class Provenance(Section):
    """Where a result comes from."""

    git_commit: str
    git_dirty: bool
    data_hash: str
    tokenizer_hash: str
    machine: str
    """CPU or GPU model."""
    threads: int
    device: str
    versions: dict[str, str]
    route_table: str
    """Version of the kernels' route table."""


class TrialResult(Section):
    """A finished (or honestly unfinished) training run."""

    config: Trial
    status: Status
    history: list[Evaluation]
    cost: Cost
    provenance: Provenance
    tokens_per_second: float
    seconds: float
    """Wall time of the whole trial; of one that was interrupted, the sum over its attempts up to what they saved."""
    message: str = ""
    """Why it diverged or stopped, where it did."""
    scores: list[Score] = Field(default_factory=list)
    """Question answering, where the trial asks for it and finished."""

    @property
    def final(self) -> Evaluation:
        """The last evaluation."""
        return self.history[-1]


class Observer(Protocol):
    """Watches a trial from outside: tracking and pruning are implementations, so training knows neither."""

    def evaluated(self, evaluation: Evaluation) -> bool:
        """Receive every evaluation; return True to ask the trial to stop as pruned."""
        ...

    def stepped(self, step: int, total: int) -> bool:
        """Called after every optimizer step; return True to ask it to save and stop as killed."""
        ...
