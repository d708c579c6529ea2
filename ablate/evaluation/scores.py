"""What an evaluation gives back: plain data, light to import."""

from __future__ import annotations

from collections.abc import Iterable

from ablate.config import Section


class Quality(Section):
    """Bits per byte on the validation part of one corpus."""

    corpus: str
    """Its source, or the name of its files or data set."""
    data_hash: str
    bpb: float
    error: float
    """Standard error, from windows as units."""
    tokens: int
    bytes: int


class Score(Section):
    """One metric of one task."""

    task: str
    shots: int
    metric: str
    value: float
    error: float | None
    """Standard error; None where the harness has none."""
    items: int
    documents: int | None
    """Offline tasks: documents the items come from; the error is clustered by them."""
    chance: float | None
    """What guessing gives; in the offline tasks, where it is known."""
    unigram: float | None
    """What token frequencies alone give (counted on the training split), in the offline tasks."""
    over_unigram: float | None
    over_unigram_error: float | None
    """Standard error of the paired difference."""
    truncated: float
    """Share of the prompts that were cut to the model's context."""

    @property
    def beats_chance(self) -> bool | None:
        """More than two standard errors above chance; None where chance is not known."""
        if self.chance is None or self.error is None:
            return None
        return self.value > self.chance + 2 * self.error


class Evaluated(Section):
    """What `ablate evaluate` found."""

    trial: str
    """Hash of the trial's settings."""
    tokenizer_hash: str
    quality: list[Quality]
    scores: list[Score]

    def metrics(self) -> dict[str, float]:
        """Flat names for tracking and tables: bpb/<corpus>, qa/<task>/<shots>shot/<metric>, and each with /error."""
        flat: dict[str, float] = {}
        named = [(f"bpb/{q.corpus}", q.bpb, q.error) for q in self.quality]
        for name, value, error in named:
            flat[name] = value
            if error is not None:
                flat[f"{name}/error"] = error
        return flat | {k: v for k, v in columns(self.scores).items() if not k.endswith(("/chance", "/unigram"))}


def columns(scores: Iterable[Score]) -> dict[str, float]:
    """Scores under flat names, for tables and tracking: qa/<task>/<shots>shot/<metric>, and what is known of its
    /error, /chance and /unigram.
    """
    flat: dict[str, float] = {}
    for score in scores:
        name = f"qa/{score.task}/{score.shots}shot/{score.metric}"
        flat[name] = score.value
        beside = {"error": score.error, "chance": score.chance, "unigram": score.unigram}
        flat |= {f"{name}/{key}": value for key, value in beside.items() if value is not None}
    return flat
