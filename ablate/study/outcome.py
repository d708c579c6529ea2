"""How a run of a study ended, and a note of it: calling `ablate study run` again on a finished study asks no database."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ablate.config import Study, digest
from ablate.files import write_text
from ablate.results.intact import problems
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan


@dataclass(slots=True)
class Outcome:
    """How a run of a study ended."""

    done: int
    total: int
    """Trials of the plan; for a search its budget, or as many as are done."""
    failed: list[str] = field(default_factory=list)
    """Trials given up after their retries, each `arm, seed: message`."""
    signal: int | None = None
    """The signal that ended it early."""
    message: str = ""
    """Why it stopped early, where no signal did."""

    @property
    def exit_code(self) -> int:
        """0 complete; 1 trials failed or the machine could not go on; 128 + n after signal n (SIGTERM: 143)."""
        if self.signal is not None:
            return 128 + self.signal
        return 1 if self.failed or self.message else 0


def remember(study: Study, root: Path, places: list[str | None], outcome: Outcome) -> None:
    """Note that a study is finished.

    Args:
        study: the study that ran.
        root: the project.
        places: where its trials and runs are kept, as the user gave them.
        outcome: how it ended; only a complete one is noted.
    """
    layout = Layout(root, study.name)
    if outcome.exit_code == 0:
        note = {
            "state": _state(study, root, places),
            "trials": sorted(layout.done()),
            "done": outcome.done,
            "total": outcome.total,
        }
        problems(layout, layout.done())  # notes that they are whole, for the next call
        write_text(layout.finished, json.dumps(note, indent=1) + "\n")


def finished(study: Study, root: Path, places: list[str | None]) -> Outcome | None:
    """Return how a study ended where all that it consists of is as it was then; None where it must be looked at closely.

    Raises:
        ConfigError: the source of the corpus is missing, or the plan is damaged.
    """
    layout = Layout(root, study.name)
    try:
        note = json.loads(layout.finished.read_text(encoding="utf-8"))
        complete = set(note["trials"]) <= layout.done() and load_plan(layout) is not None
        if complete and note["state"] == _state(study, root, places) and not problems(layout, note["trials"]):
            return Outcome(note["done"], note["total"])
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        pass  # never finished, or damaged: looked at closely
    return None


def _state(study: Study, root: Path, places: list[str | None]) -> str:
    """Return the digest of what decides the outcome: the study, its corpus, and where results are kept."""
    from ablate.data.tokens import corpus_key

    data = root / "data"
    key = corpus_key(study.trial({}).corpus, data)
    card = data / key / "card.json"
    made = card.read_text(encoding="utf-8") if card.exists() else ""
    unsent = sorted(p.name for p in (Layout(root, study.name).state / "spool" / study.name).glob("*"))
    return digest([study.model_dump(mode="json"), places, key, made, unsent])
