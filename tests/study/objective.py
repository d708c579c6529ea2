"""A cheap trial with run_trial's contract: gradient descent on a small quadratic, with checkpoints, so that studies can
be interrupted hundreds of times in a test. Importable, as workers are spawned processes."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from ablate.balance import metrics, usage
from ablate.config import Study, Trial, parse
from ablate.data.tokens import prepare
from ablate.model.counts import Cost, count
from ablate.training.result import Evaluation, Observer, Provenance, Status, TrialResult

STEP_SECONDS = 0.002
COST = Cost(total_params=10, active_params=5, total_units=8, active_units=2, active_frac=0.25, flops_per_token=10)
PROVENANCE = Provenance(
    git_commit="",
    git_dirty=False,
    data_hash="none",
    tokenizer_hash="none",
    machine="any",
    threads=1,
    device="cpu",
    versions={},
    route_table="0",
)


def study(**changes: Any) -> Study:
    """A study of eight trials of 20 steps."""
    settings: dict[str, Any] = {
        "name": "cheap",
        "base": {"train": {"steps": 20, "eval_every": 5, "checkpoint_every": 4}},
        "factors": {"tree.mirror": [0, 1], "tree.placement": ["unit", "tree"]},
        "seeds": [0, 1],
    }
    return parse(Study, {**settings, **changes})


_WEIGHTS: list[weakref.ref[Weights]] = []


class Weights:
    """Stands for a model: it is part of a cycle, as Lightning's modules and trainers are."""

    def __init__(self) -> None:
        self.trainer = {"module": self}


def cyclic(trial: Trial, **rest: Any) -> TrialResult:
    """Descend, and fail where the weights of an earlier trial of this process are still there."""
    gc.disable()  # so that none goes by chance
    if any(weights() is not None for weights in _WEIGHTS):
        raise RuntimeError("an earlier trial's weights are kept")
    _WEIGHTS.append(weakref.ref(Weights()))
    return descend(trial, **rest)


def descend(
    trial: Trial,
    *,
    data_root: Path,
    folder: Path,
    observer: Observer | None,
    threads: int | None,
    leaves: tuple[int, int, int] = (1, 1, 4),
) -> TrialResult:
    """Minimise |x - target|²; bpb is its square root. Goes on from `last.json` where that is there.

    `leaves` is the shape [layers, trees, leaves] of the made-up leaf counts.
    """
    train = trial.train
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.json"
    target = np.array([trial.tree.mirror, float(len(trial.tree.placement)), train.lr])
    x = np.random.default_rng(trial.init_seed).normal(size=3)
    step, history = 0, []
    if last.exists():
        saved = json.loads(last.read_text())
        x, step = np.array(saved["x"]), saved["step"]
        history = [Evaluation.model_validate(e) for e in saved["history"]]
    status: Status = "finished"

    def evaluate() -> bool:
        counts = np.random.default_rng([trial.init_seed, step]).integers(0, 50, leaves)
        history.append(
            Evaluation(
                step=step,
                tokens=step * train.batch_size * trial.model.context,
                bpb=float(np.sqrt(np.sum((x - target) ** 2))),
                train_loss=None if step == 0 else 1.0 / step,
                lr=train.lr,
                seconds=step / 100,
                balance=metrics.summary(counts),
            )
        )
        part = folder / f"{step:03d}.parquet"
        usage.rows(step, "held_out", counts).write_parquet(part)
        return observer is not None and observer.evaluated(history[-1])

    def save() -> None:
        partial = folder / "last.partial"
        state = {"x": x.tolist(), "step": step, "history": [e.model_dump() for e in history]}
        partial.write_text(json.dumps(state))
        partial.replace(last)

    if not history and evaluate():
        status = "pruned"
    while step < train.steps and status == "finished":
        x = x - 0.1 * (x - target)
        step += 1
        time.sleep(STEP_SECONDS)
        if (step % train.eval_every == 0 or step == train.steps) and evaluate():
            status = "pruned"
        if observer is not None and observer.stepped(step, train.steps) and step < train.steps:
            status = "killed"
        if step % train.checkpoint_every == 0 or status == "killed":
            save()
    if status != "killed":
        import polars as pl

        parts = [pl.read_parquet(folder / f"{e.step:03d}.parquet") for e in history]
        pl.concat(parts).write_parquet(folder / "usage.parquet")
    return TrialResult(
        config=trial,
        status=status,
        history=history,
        cost=COST,
        provenance=PROVENANCE,
        tokens_per_second=1.0,
        seconds=0.1,
    )


def rated(
    trial: Trial, *, data_root: Path, folder: Path, observer: Observer | None, threads: int | None
) -> TrialResult:
    """The same with a planted best rate: 4 times the default for mirror 0, none for mirror 1 (more is always better); a
    seed moves all rates alike."""
    result = descend(trial, data_root=data_root, folder=folder, observer=observer, threads=threads)
    octaves = float(np.log2(trial.train.lr / 0.003))
    lost = 0.01 * (octaves - 2) ** 2 if trial.tree.mirror == 0 else -0.01 * octaves
    last = result.history[-1].model_copy(update={"bpb": 2.0 + 0.001 * (trial.init_seed % 7) + lost})
    return result.model_copy(update={"history": [*result.history[:-1], last]})


def rated_slowly(
    trial: Trial, *, data_root: Path, folder: Path, observer: Observer | None, threads: int | None
) -> TrialResult:
    """The same, slow enough to be interrupted."""
    time.sleep(0.25)
    return rated(trial, data_root=data_root, folder=folder, observer=observer, threads=threads)


def timed(
    trial: Trial, *, data_root: Path, folder: Path, observer: Observer | None, threads: int | None
) -> TrialResult:
    """The same; each process notes which trials it ran, and when, under root/times."""
    notes = folder.parents[2] / "times"
    notes.mkdir(exist_ok=True)
    start = time.time()
    result = descend(trial, data_root=data_root, folder=folder, observer=observer, threads=threads)
    with (notes / f"{os.getpid()}.jsonl").open("a") as file:
        note = {"trial": trial.hash(), "worker": os.getpid(), "start": start, "end": time.time()}
        file.write(json.dumps(note) + "\n")
    return result


def slow(
    trial: Trial,
    *,
    data_root: Path,
    folder: Path,
    observer: Observer | None,
    threads: int | None,
    leaves: tuple[int, int, int] = (1, 1, 4),
) -> TrialResult:
    """The same, slow enough to be interrupted."""

    class Slow:
        def evaluated(self, evaluation: Evaluation) -> bool:
            return observer is not None and observer.evaluated(evaluation)

        def stepped(self, step: int, total: int) -> bool:
            time.sleep(0.05)
            return observer is not None and observer.stepped(step, total)

    return descend(trial, data_root=data_root, folder=folder, observer=Slow(), threads=threads, leaves=leaves)


def whole(
    trial: Trial, *, data_root: Path, folder: Path, observer: Observer | None, threads: int | None
) -> TrialResult:
    """The same slow one with the corpus, sizes and leaves of a real trial, so that the whole pipeline takes its result."""
    corpus = prepare(trial.corpus, data_root)
    shape = (trial.model.blocks, trial.tree.trees, trial.tree.leaves)
    result = slow(trial, data_root=data_root, folder=folder, observer=observer, threads=threads, leaves=shape)
    made = {"data_hash": corpus.data_hash, "tokenizer_hash": corpus.tokenizer_hash}
    return result.model_copy(
        update={
            "cost": count(trial, trial.corpus.vocab_size),
            "provenance": result.provenance.model_copy(update=made),
        }
    )


def greedy(
    trial: Trial, *, data_root: Path, folder: Path, observer: Observer | None, threads: int | None
) -> TrialResult:
    """The same; one trial takes all the memory that there is, in small pieces, so that the kernel has to end it."""
    taken = []
    if trial.tree.mirror == 1 and trial.tree.placement == "tree" and trial.init_seed == 1:
        for _ in range(4096):
            taken.append(b"x" * (1 << 20))
    return descend(trial, data_root=data_root, folder=folder, observer=observer, threads=threads)


def sick(trial: Trial, *, data_root: Path, folder: Path, observer: Observer | None, threads: int | None) -> TrialResult:
    """Fails for one arm, always; kills its own process the first time for another; diverges for a third."""
    if trial.tree.mirror == 1 and trial.tree.placement == "tree":
        raise FloatingPointError("this arm never works")
    first = folder / "killed"
    if trial.tree.mirror == 1 and not first.exists():
        folder.mkdir(parents=True, exist_ok=True)
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    result = descend(trial, data_root=data_root, folder=folder, observer=observer, threads=threads)
    if trial.tree.mirror == 0 and trial.tree.placement == "tree":
        lost = result.history[-1].model_copy(update={"bpb": None})
        return result.model_copy(update={"status": "diverged", "history": [*result.history[:-1], lost]})
    return result


def treeless(
    trial: Trial, *, data_root: Path, folder: Path, observer: Observer | None, threads: int | None
) -> TrialResult:
    """The same; a dense layer has no balance, as in a real trial."""
    result = descend(trial, data_root=data_root, folder=folder, observer=observer, threads=threads)
    if trial.model.feedforward == "tree":
        return result
    return result.model_copy(update={"history": [e.model_copy(update={"balance": {}}) for e in result.history]})
