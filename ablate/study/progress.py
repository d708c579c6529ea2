"""A running study in the terminal: a live table where there is one, a line a trial where there is none."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ablate.study.worker import Event


def duration(seconds: float) -> str:
    """`1h02m`, `3m05s` or `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class Display:
    """Shows what each worker does, how far the study is, and when it will be done."""

    def __init__(self, name: str, total: int, done: int, workers: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.workers = workers
        self._now: dict[str, Event] = {}
        self._finished: list[float] = []
        self._best: tuple[float, str] | None = None
        self._failures = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self.console,
        )
        self._task: TaskID = self._progress.add_task(name, total=total or None, completed=done, eta="")
        self._total, self._done = total, done
        self._live = Live(self._render(), console=self.console, refresh_per_second=4, transient=False)
        self._shown = 0.0

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

    def grow(self, total: int) -> None:
        """The study has more trials now (learning rates were chosen)."""
        self._total = total
        self._progress.update(self._task, total=total or None)

    def say(self, text: str) -> None:
        """A line above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tell(self, event: Event) -> None:
        """News from a worker."""
        if event.kind in {"started", "stepped"}:
            self._now[event.worker] = event
        else:
            self._now.pop(event.worker, None)
        label = f"{event.arm} · seed {event.seed}"
        if event.kind == "finished":
            self._done += 1
            self._finished.append(event.seconds)
            if event.bpb is not None and (self._best is None or event.bpb < self._best[0]):
                self._best = (event.bpb, event.arm)
            self._progress.update(self._task, completed=self._done, eta=self._eta())
            if not self.console.is_terminal:
                bpb = f"{event.bpb:.4f} bpb" if event.bpb is not None else "no bpb"
                of = f"/{self._total}" if self._total else ""
                self.say(
                    f"[{self._done}{of}] {label}: {event.status}, {bpb}, {duration(event.seconds)}{self._eta(', ')}"
                )
            elif event.status == "diverged":
                self.say(f"{label}: diverged")
        elif event.kind in {"failed", "retried", "fatal"}:
            self._failures += event.kind == "failed"
            what = {"failed": "failed", "retried": "failed, will be tried again", "fatal": "stopped"}[event.kind]
            self.say(f"{label}: {what}: {event.message}")
        if self.console.is_terminal and time.monotonic() - self._shown > 0.2:
            self._shown = time.monotonic()
            self._live.update(self._render())

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
            table.add_row(event.arm, str(event.seed), step)
        if self._best:
            table.caption = f"best so far {self._best[0]:.4f} bpb, {self._best[1]}"
        if self._failures:
            table.caption = f"{table.caption or ''} · {self._failures} failed"
        return Group(self._progress, table)
