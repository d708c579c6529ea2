"""A running study in the terminal: a live table where there is one, a line a trial where there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ablate.config import Study
from ablate.study.designs import Plan
from ablate.study.job import Event
from ablate.study.leaders import leaders

AGAIN = 3.0
"""Seconds between two lines while something goes on and there is no table."""


def duration(seconds: float) -> str:
    """`1h02m`, `3m05s` or `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class Display:
    """Shows what each worker does, how far the study is, the best so far, and when it will be done."""

    def __init__(self, study: Study, workers: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.workers = workers
        self._objectives = tuple(study.objectives)
        self._now: dict[str, Event] = {}
        self._finished: list[float] = []
        self._scores: dict[str, dict[int, Sequence[float]]] = {}
        self._failures = 0
        self._total = self._done = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self.console,
        )
        self._task: TaskID = self._progress.add_task(study.name, total=None, eta="")
        self._live = Live(self._render(), console=self.console, refresh_per_second=4, transient=False)
        self._shown = self._spoke = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    def start(self, plan: Plan, done: int, known: Mapping[str, Mapping[int, Sequence[float]]] | None = None) -> None:
        """Show a phase of a study.

        Args:
            plan: what is to run.
            done: trials that have a result.
            known: the objectives' values of those trials, by arm and seed.
        """
        self._total, self._done = plan.total, done
        self._scores = {arm: dict(values) for arm, values in (known or {}).items()}
        self._progress.update(self._task, total=plan.total or None, completed=done)
        if done and not self.console.is_terminal:
            self.say(f"[{done}{self._of()}] done before{self._best_text(', ')}")

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._spoke = time.monotonic()
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Say what is being done, where it takes longer than a second, and again while it goes on."""
        ended = threading.Event()

        def tell() -> None:
            started = time.monotonic()
            if not ended.wait(1.0):
                self.say(text)
            while not ended.wait(AGAIN):
                self.say(f"{text}: {duration(time.monotonic() - started)}")

        threading.Thread(target=tell, daemon=True, name="busy").start()
        try:
            yield
        finally:
            ended.set()

    def tell(self, event: Event) -> None:
        """Show what happened in a worker."""
        if event.kind == "planned":
            self._total = event.total
            self._progress.update(self._task, total=event.total)
            return
        if event.kind in {"started", "stepped"}:
            self._now[event.worker] = event
        else:
            self._now.pop(event.worker, None)
        label = f"{event.arm} · seed {event.seed}"
        if event.kind == "stepped" and not self.console.is_terminal and time.monotonic() - self._spoke > AGAIN:
            self.say(f"[{self._done}{self._of()}] {label}: step {event.step} of {event.total}")
        if event.kind == "finished":
            self._done += 1
            self._finished.append(event.seconds)
            if event.values is not None and event.status == "finished":
                self._scores.setdefault(event.arm, {})[event.seed] = event.values
            self._progress.update(self._task, completed=self._done, eta=self._eta())
            if not self.console.is_terminal:
                text = self._text(event.values) if event.values is not None else "no result"
                self.say(
                    f"[{self._done}{self._of()}] {label}: {event.status}, {text}, {duration(event.seconds)}"
                    f"{self._eta(', ')}{self._best_text('; ')}"
                )
            elif event.status == "diverged":
                self.say(f"{label}: diverged")
        elif event.kind in {"failed", "retried", "lost"}:  # what is fatal ends the study, which says it once
            self._failures += event.kind == "failed"
            what = {
                "failed": "failed",
                "retried": "failed, will be tried again",
                "lost": "a worker ended",
            }[event.kind]
            self.say(f"{label}: {what}: {event.message}" if event.arm else f"{what}: {event.message}")
        if self.console.is_terminal and time.monotonic() - self._shown > 0.2:
            self._shown = time.monotonic()
            self._live.update(self._render())

    def _best_text(self, before: str = "") -> str:
        found = leaders(self._objectives, self._scores)
        return f"{before}best {', '.join(map(str, found))}" if found else ""

    def _text(self, values: Sequence[float]) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in zip(self._objectives, values, strict=True))

    def _of(self) -> str:
        return f"/{self._total}" if self._total else ""

    def _eta(self, before: str = "") -> str:
        left = self._total - self._done
        if not self._finished or left <= 0:
            return ""
        recent = self._finished[-50:]
        return f"{before}about {duration(sum(recent) / len(recent) * left / self.workers)} left"

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(self._now))
        for column in ("arm", "seed", "step"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for event in self._now.values():
            step = f"{event.step}/{event.total}" if event.step else "starting"
            table.add_row(Text(event.arm), str(event.seed), step)
        caption = [self._best_text()]
        if self._failures:
            caption.append(f"{self._failures} failed")
        if any(caption):
            table.caption = Text(" · ".join(filter(None, caption)), "table.caption")
        return Group(self._progress, table)
