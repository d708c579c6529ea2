"""The `ablate` command with a clock in every worker: run as a file by `bench.study`, with any version of the package on the path.

A worker's seconds are laid to the innermost part that is at work. A spawned process runs this file again before it is
told what to do (as `__mp_main__`), and there the functions below are put under the clock.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "ABLATE_BENCH_PARTS"
"""Environment variable: where each worker leaves `<process>.json`."""

# Part, module, function. Several modules import what they call by name, so that it is replaced where it is called. What a
# version does not have is left out.
TIMED = (
    ("corpus", "ablate.training.trial", "open_task"),
    ("kernels", "numba.core.dispatcher", "Dispatcher.compile"),
    ("model", "ablate.training.module", "TrialModule.__init__"),
    ("forward", "ablate.model.transformer", "Transformer.features"),
    ("forward", "ablate.tasks.facts", "FactsModel.forward"),
    ("loss", "ablate.training.module", "TrialModule.training_step"),
    ("backward", "torch.autograd", "backward"),
    ("optimizer", "torch.optim", "AdamW.step"),
    ("optimizer", "ablate.training.optimizer", "TreeAdamW._shrink"),
    ("optimizer", "ablate.training.module", "TrialModule.on_before_optimizer_step"),
    ("optimizer", "ablate.model.tree", "TreeFeedForward.finish_step"),
    ("lightning", "lightning.pytorch", "Trainer.__init__"),
    ("lightning", "lightning.pytorch", "Trainer.fit"),
    ("evaluation", "ablate.training.callbacks", "Evaluator._evaluate"),
    ("probes", "ablate.balance.probe", "Probe._measure"),
    ("probes", "ablate.balance.probe", "Probe._compare"),
    ("probes", "ablate.balance.probe", "Probe.summary"),
    ("probes", "ablate.balance.probe", "Probe.watch"),
    ("probes", "ablate.balance.probe", "Probe.watch_training"),
    ("writing", "ablate.balance.usage", "UsageParts.write"),
    ("writing", "ablate.training.callbacks", "Evaluator._save"),
    ("writing", "ablate.training.trial", "_write_usage"),
    ("writing", "ablate.training.trial", "_provenance"),
    ("writing", "ablate.study.attempt", "save_record"),
    ("writing", "ablate.study.attempt", "leaf_deaths"),
    ("writing", "ablate.study.attempt", "tree_means"),
    ("queue", "ablate.study.queue", "Queue.claim"),
    ("queue", "ablate.study.queue", "Queue.finish"),
    ("tracking", "ablate.tracking.tracker", "MlflowTracker.open_trial"),
    ("tracking", "ablate.tracking.tracker", "MlflowTrial.evaluated"),
    ("tracking", "ablate.tracking.tracker", "MlflowTrial.finish"),
    ("tracking", "ablate.tracking.tracker", "MlflowTrial.close"),
    ("other", "ablate.study.attempt", "Attempt.run"),
    ("queue", "ablate.study.engines", "work"),
)
PARTS = ("imports", *dict.fromkeys(part for part, _, _ in TIMED))
TRAINING = {"forward", "loss", "backward", "optimizer"}
OUTSIDE = {"evaluation", "probes", "writing"}
"""Inside these a forward or backward pass is theirs."""


class Clock:
    """Seconds by part, of one process; what runs inside another part is taken from it."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._now, self._stack, self._since = now, list[str](), now()

    def enter(self, part: str) -> None:
        """Begin a part."""
        inner = self._stack[-1] if self._stack else part
        self._turn()
        self._stack.append(inner if part in TRAINING and inner in OUTSIDE else part)

    def leave(self) -> None:
        """End the part that began last."""
        self._turn()
        self._stack.pop()

    def _turn(self) -> None:
        now = self._now()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now


class Meter:
    """A worker's clock, and how long each of its trials took to start."""

    def __init__(self, born: float) -> None:
        self.clock, self._born, self._begun = Clock(), born, 0.0
        self._starts: list[float] = []

    def install(self) -> None:
        """Put this process under the clock, importing what it will import anyway."""
        self.clock.seconds["imports"] += time.time() - self._born
        self.clock.enter("imports")
        for part, module, name in TIMED:
            self._wrap(part, module, name)
        self.clock.leave()
        self._listen("ablate.study.attempt", "Attempt.run", self._begin, self.save)
        self._listen("ablate.training.callbacks", "Evaluator.on_train_start", self._started, None)
        self._listen("ablate.study.engines", "work", None, self.save)

    def save(self) -> None:
        """Leave what is known so far."""
        times = os.times()
        content: dict[str, Any] = {"born": self._born, "ended": time.time(), "cpu": times.user + times.system}
        content |= {"starts": self._starts, "parts": self.clock.seconds}
        (Path(os.environ[FOLDER]) / f"{os.getpid()}.json").write_text(json.dumps(content), encoding="utf-8")

    def _begin(self) -> None:
        self._begun = time.perf_counter()

    def _started(self) -> None:
        self._starts.append(time.perf_counter() - self._begun)

    def _wrap(self, part: str, module: str, name: str) -> None:
        clock = self.clock
        self._listen(module, name, functools.partial(clock.enter, part), clock.leave)

    @staticmethod
    def _listen(module: str, name: str, before: Callable[[], None] | None, after: Callable[[], None] | None) -> None:
        """Call something before and after a function, in the main thread: others run beside it."""
        import threading

        *path, last = name.split(".")
        try:
            owner: Any = functools.reduce(getattr, path, importlib.import_module(module))
            inner = getattr(owner, last)
        except (ImportError, AttributeError):
            return

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return inner(*args, **kwargs)
            if before:
                before()
            try:
                return inner(*args, **kwargs)
            finally:
                if after:
                    after()

        setattr(owner, last, outer)


def _metered() -> None:
    """Replace the first function that a worker is told to run by one that starts the clock before it."""
    import gc

    import psutil

    from ablate.training import lifeline

    inner = lifeline.guarded

    def guarded(parent: int, work: bytes, *rest: Any) -> None:
        lifeline.die_with(parent)
        gc.set_threshold(lifeline.COLLECT_AFTER)
        Meter(psutil.Process().create_time()).install()
        inner(parent, work, *rest)

    lifeline.guarded = guarded


if __name__ == "__mp_main__":
    _metered()
elif __name__ == "__main__":
    # The command as its users start it; by name, as rooms do not import from those below them.
    sys.exit(importlib.import_module("ablate.cli").main())
