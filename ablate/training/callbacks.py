"""What happens between optimizer steps: evaluation, the usage table, checkpoints, and being asked to stop."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import polars as pl_frames
import torch
from torch import Tensor

from ablate.balance.motion import MotionRecorder
from ablate.balance.probe import Probe
from ablate.balance.usage import UsageParts
from ablate.config import Trial
from ablate.config.endpoints import BPB, quality_of
from ablate.distributed import gather, world_size
from ablate.evaluation.bits_per_byte import WINDOWS_SCHEMA
from ablate.files import replacing
from ablate.results.layout import LAST
from ablate.tasks.task import TrialTask
from ablate.training.module import TrialModule
from ablate.training.result import Evaluation, Observer, Status
from ablate.training.schedule import learning_rate
from ablate.training.sharding import gathered

USAGE_PARTS = "usage"


class Evaluator(pl.Callback):
    """Evaluates at step 0, every `eval_every` steps and at the end; keeps the history and the usage of leaves."""

    def __init__(self, trial: Trial, task: TrialTask, folder: Path, observer: Observer | None, started: float) -> None:
        self.trial, self.task, self.folder, self.observer = trial, task, folder, observer
        self.history: list[Evaluation] = []
        self.status: Status = "finished"
        self.message = ""
        self._probe = Probe(task.loss, task.labels)
        self._parts = UsageParts(folder / USAGE_PARTS)
        self._motion = MotionRecorder() if trial.train.motion else None
        self.windows = Windows()
        self._training_counts: Tensor | None = None
        self._comparable_from = 0
        """First step whose probe tokens are those of now: each process has its own, so another number of them has others."""
        self._seconds, self._since, self._step = 0.0, time.perf_counter(), 0
        # Wall time of earlier attempts, and when (time.perf_counter) this one began.
        self._earlier, self._started = 0.0, started

    def state_dict(self) -> dict[str, Any]:
        """History, clock and counts, as text and tensors so that checkpoints load with weights_only."""
        history = [e.model_dump(mode="json") for e in self.history]
        return {
            "history": json.dumps(history),
            "seconds": self._seconds + time.perf_counter() - self._since,
            "spent": self.spent(),
            "training_counts": self._probe.training_counts(),
            "motion": self._motion.state_dict() if self._motion else {},
            "parts": json.dumps(self._parts.digests),
            "ranks": world_size(),
            "comparable_from": self._comparable_from,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of an interrupted run."""
        self.history = [Evaluation.model_validate(e) for e in json.loads(state_dict["history"])]
        self._seconds, self._earlier = state_dict["seconds"], state_dict["spent"]
        self._training_counts = state_dict["training_counts"]
        self._parts.digests = json.loads(state_dict.get("parts", "{}"))
        same = state_dict.get("ranks", world_size()) == world_size()
        self._comparable_from = state_dict.get("comparable_from", 0) if same else self.history[-1].step + 1
        if self._motion and same:
            self._motion.load_state_dict(state_dict["motion"])

    def spent(self) -> float:
        """Wall seconds of the trial over all its attempts, each up to its last checkpoint."""
        return self._earlier + time.perf_counter() - self._started

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the untrained model, unless this run goes on from a checkpoint."""
        assert isinstance(pl_module, TrialModule)
        self._step, self._since = trainer.global_step, time.perf_counter()
        self._probe.attach(pl_module.model)
        if not self.history:
            self._evaluate(trainer, pl_module)
        else:
            last = self.history[-1].step
            kept = last >= self._comparable_from and trainer.is_global_zero  # rank 0's leaves are kept
            self._probe.resume(self._parts.leaves(last) if kept else None, self._training_counts)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: look for divergence, evaluate and save when due, stop when asked."""
        assert isinstance(pl_module, TrialModule)
        self._probe.watch_training()
        if trainer.global_step == self._step:
            return
        self._step = step = trainer.global_step
        train = self.trial.train
        due = step % train.eval_every == 0 or step == train.steps
        # Reading the flag waits for the device; on a GPU it is read at evaluations only.
        if (due or pl_module.device.type == "cpu") and _any(trainer, not bool(pl_module.finite)):
            self._stop(trainer, "diverged", f"the training loss was not finite at step {step}")
            self._evaluate(trainer, pl_module, lost=True)
            return
        if due:
            self._evaluate(trainer, pl_module)
        asked = _any(trainer, self.observer is not None and self.observer.stepped(step, train.steps))
        if asked and step < train.steps:
            self._stop(trainer, "killed", f"stopped when asked, after step {step}")
        if (step % train.checkpoint_every == 0 or self.status == "killed") and step < train.steps:
            self._save(trainer)

    def usage(self) -> pl_frames.DataFrame:
        """The usage table of every evaluation in the history."""
        return self._parts.usage([e.step for e in self.history])

    def trees(self) -> pl_frames.DataFrame:
        """The tree table of every evaluation in the history."""
        steps = [e.step for e in self.history]
        return self._parts.trees(steps, self.trial.tree.leaves, since=self._comparable_from)

    def motion(self) -> pl_frames.DataFrame:
        """The motion table of every evaluation in the history."""
        return self._parts.motion([e.step for e in self.history])

    def _evaluate(self, trainer: pl.Trainer, module: TrialModule, *, lost: bool = False) -> None:
        """One evaluation; `lost` records a diverged model without running it."""
        self._seconds += time.perf_counter() - self._since
        step, train = trainer.global_step, self.trial.train
        measured: dict[str, float] = {}
        balance: dict[str, float] = {}
        if not lost:
            with gathered(module.model):  # processes run it on different numbers of batches
                measured, moved = self._measure(trainer, module, step)
            if not np.isfinite(measured[quality_of(self.trial.task.kind).name]):
                self._stop(trainer, "diverged", f"the held-out loss was not finite at step {step}")
                measured = {}
            if module.model.trees():
                balance = self._probe.summary()
                if trainer.is_global_zero:
                    probe = self._probe
                    self._parts.write(step, probe.rows(step), probe.tree_rows(step), probe.leaves, moved)
        evaluation = Evaluation(
            step=step,
            tokens=step * train.batch_size * self.trial.positions,
            bpb=measured.pop(BPB.name, None),
            task=measured,
            train_loss=_finite(module.take_train_loss()),
            lr=learning_rate(train, min(step, train.steps - 1)),
            seconds=self._seconds,
            balance=balance,
        )
        self.history.append(evaluation)
        given_up = _any(trainer, self.observer is not None and self.observer.evaluated(evaluation))
        if given_up and self.status == "finished":
            self._stop(trainer, "pruned", f"pruned at step {step}")
        self._since = time.perf_counter()

    def _measure(
        self, trainer: pl.Trainer, module: TrialModule, step: int
    ) -> tuple[dict[str, float], pl_frames.DataFrame | None]:
        """Run the model on held-out and probe inputs; return the task's measures, and rank 0's rows of motion if asked for."""
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        windows = self.windows.add if step == self.trial.train.steps else None
        with self._probe.held_out():
            measured = self.task.measure(module.model, loader, self._probe.watch, windows)
        self.windows.close()
        if self._motion is None or not module.model.trees() or not trainer.is_global_zero:
            return measured, None
        return measured, self._motion(step, module.model, self._probe.ids)

    def _stop(self, trainer: pl.Trainer, status: Status, message: str) -> None:
        self.status, self.message = status, message
        trainer.should_stop = True

    def _save(self, trainer: pl.Trainer) -> None:
        """Replace `last.ckpt` in one step. All ranks take part; rank 0 writes."""
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.folder / LAST)
            return
        with replacing(self.folder / LAST) as partial:
            trainer.save_checkpoint(partial)


class Windows:
    """Bits and bytes of each window of the last evaluation, over all processes."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []
        self.table: pl_frames.DataFrame | None = None
        """Columns of evaluation.bits_per_byte.WINDOWS_SCHEMA, in the order of the text; None before the last evaluation."""

    def add(self, bits: Tensor, lengths: Tensor) -> None:
        """Take the windows of one batch."""
        self._parts.append((bits.cpu(), lengths.cpu()))

    def close(self) -> None:
        """Put the windows of all processes together, of which each has every world_size-th; all take part."""
        if not self._parts:
            return
        mine = torch.stack([torch.cat([part[i].double() for part in self._parts]) for i in (0, 1)])
        everyone = gather(mine)
        whole = torch.zeros(2, sum(one.shape[1] for one in everyone), dtype=torch.float64)
        for place, one in enumerate(everyone):
            whole[:, place :: len(everyone)] = one
        bits, lengths = whole.numpy()
        columns = {"window": np.arange(len(bits)), "bytes": lengths, "bits": bits}
        self.table = pl_frames.DataFrame(columns).cast(WINDOWS_SCHEMA)  # type: ignore[arg-type]


def unusable(saved: dict[str, Any], module: TrialModule) -> str:
    """Return why a checkpoint's content is none that this trial can go on from, empty where it is one."""
    wanted = {"global_step", "state_dict", "optimizer_states", "callbacks", "loops"}
    if missing := sorted(wanted - saved.keys()):
        return f"it has no {missing[0]}"
    if _state_of(saved) is None:
        return "it has no history of evaluations"
    own, kept = module.state_dict(), saved["state_dict"]
    if not isinstance(kept, dict) or {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in kept.items()}:
        return "its weights are of another model"
    return ""


def damaged_parts(folder: Path, saved: dict[str, Any]) -> str:
    """Return what is wrong with the tables that a checkpoint counts on, empty where nothing is."""
    digests = json.loads((_state_of(saved) or {}).get("parts", "{}"))  # none before version 0.2
    name = UsageParts(folder / USAGE_PARTS).damaged(digests)
    return f"its table {name} is missing or damaged" if name else ""


def _state_of(saved: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state of the Evaluator in a checkpoint."""
    callbacks = saved["callbacks"]
    found = callbacks.get(Evaluator.__qualname__) if isinstance(callbacks, dict) else None
    return found if isinstance(found, dict) and "history" in found else None


def _any(trainer: pl.Trainer, decision: bool) -> bool:
    """Whether any rank decided so: all of them go on or stop together."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False)


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
