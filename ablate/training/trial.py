"""`run_trial`: one complete training run, the one way in for studies, workers, tests and `ablate reproduce`."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
import subprocess
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ablate.config import ConfigError, Trial
from ablate.evaluation.scores import Score
from ablate.files import leftovers, replacing
from ablate.kernels.backend import REFERENCE, choose, load
from ablate.model.memory import check_memory
from ablate.results.layout import LAST, MODEL, MOTION, TREES, USAGE, WINDOWS
from ablate.tasks.registry import open_task
from ablate.tasks.task import TrialTask
from ablate.training import ranks
from ablate.training.callbacks import USAGE_PARTS, Evaluator, damaged_parts, unusable
from ablate.training.checkpoint import read_checkpoint, save_model, whole_zip
from ablate.training.module import TrialModule
from ablate.training.ranks import Place
from ablate.training.result import Observer, Provenance, TrialResult
from ablate.training.sharding import whole_state

_log = logging.getLogger(__name__)


def run_trial(
    trial: Trial,
    *,
    data_root: Path,
    folder: Path,
    observer: Observer | None = None,
    threads: int | None = None,
    resume: bool = True,
) -> TrialResult:
    """Train and evaluate `trial`; usage, trees and windows.parquet (motion.parquet and model.pt, if asked for) are written to `folder`.

    With `resume`, a `last.ckpt` in `folder` is continued: on a CPU with the same threads the result equals that of an
    uninterrupted run bit for bit. Status is finished, diverged, pruned or killed (asked to stop; `last.ckpt` is written).
    Questions that the trial asks for are asked at the end of a finished run; what each gave is written to items.parquet.
    With `train.devices` over 1 this process is rank 0 of as many, which share its threads. Raises ConfigError before any
    work where the settings or the corpus cannot be used.
    """
    started = time.perf_counter()
    devices = trial.train.devices
    _check_devices(trial)
    check_memory([("the trial", trial)])
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in leftovers(folder):
        unfinished.unlink()
    if not resume:
        (folder / LAST).unlink(missing_ok=True)
        shutil.rmtree(folder / USAGE_PARTS, ignore_errors=True)
    task = open_task(trial, data_root)
    if devices == 1:
        return _run(None, trial, task, folder, threads, observer, started)
    each = None if threads is None else max(1, threads // devices)
    others = partial(_other_rank, trial=trial, data_root=data_root, folder=folder, threads=each)
    with ranks.started(devices, others) as place:
        return _run(place, trial, task, folder, each, observer, started)


def _check_devices(trial: Trial) -> None:
    train = trial.train
    if torch.cuda.is_available() and train.devices > torch.cuda.device_count():
        raise ConfigError(
            f"train.devices is {train.devices}: a worker has {torch.cuda.device_count()} GPUs here; one trial uses at most those"
        )


def _other_rank(place: Place, *, trial: Trial, data_root: Path, folder: Path, threads: int | None) -> None:
    """A process beside rank 0: trains with it, and leaves files and reports to it."""
    _run(place, trial, open_task(trial, data_root), folder, threads, None, time.perf_counter())


def _run(
    place: Place | None,
    trial: Trial,
    task: TrialTask,
    folder: Path,
    threads: int | None,
    observer: Observer | None,
    started: float,
) -> TrialResult:
    """The trial in one process, the only one or one of its ranks."""
    if threads is not None:
        torch.set_num_threads(threads)
    last = folder / LAST
    torch.manual_seed(trial.init_seed)
    module = TrialModule(trial, task)
    saved = _to_go_on_from(folder, module, place)
    resuming = saved is not None
    if not resuming:
        module.model.calibrate(task.calibration())
    data = task.data(saved["global_step"] if saved else 0)
    evaluator = Evaluator(trial, task, folder, observer, started)
    trainer = _trainer(trial, evaluator, folder, place)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, datamodule=data, ckpt_path=last if resuming else None, weights_only=True)
    scores: list[Score] = []
    device = trainer.strategy.root_device
    model = module.model
    if evaluator.status == "finished" and module.sharded:
        state = whole_state(model)  # every process takes part
        if trainer.is_global_zero:
            model = task.model()
            model.load_state_dict(state)
    if evaluator.status == "finished" and trainer.is_global_zero:
        scores = task.ask(model.to(device), folder)  # Lightning has put it back on the CPU
    result = TrialResult(
        config=trial,
        status=evaluator.status,
        history=evaluator.history,
        cost=task.cost(),
        provenance=_provenance(trial, task, device),
        tokens_per_second=evaluator.history[-1].tokens / max(evaluator.history[-1].seconds, 1e-9),
        seconds=evaluator.spent(),
        message=evaluator.message,
        scores=scores,
    )
    if evaluator.status != "killed" and trainer.is_global_zero:
        _write_usage(evaluator, folder)
        if trial.train.keep_checkpoint and evaluator.status == "finished":
            save_model(folder / MODEL, model, trial, str(task.card["tokenizer_hash"]))
        last.unlink(missing_ok=True)
    return result


def _to_go_on_from(folder: Path, module: TrialModule, place: Place | None) -> dict[str, Any] | None:
    """Return the content of `last.ckpt`, None where there is none or it is damaged: then it is set aside.

    All ranks look, and rank 0 moves the file.
    """
    last = folder / LAST
    if not last.exists():
        return None
    saved, why = None, ""
    try:
        saved = read_checkpoint(last)
        why = "" if whole_zip(last) else "its checksums are not those that were written with it"
        why = why or unusable(saved, module) or damaged_parts(folder, saved)
    except ConfigError as error:
        why = str(error)
    if not why:
        return saved
    if place is None or place.rank == 0:
        _log.warning("%s cannot be gone on from (%s): set aside; the trial goes on from the start", last, why)
        last.replace(last.with_name(f"{LAST}.damaged"))
        shutil.rmtree(folder / USAGE_PARTS, ignore_errors=True)
    return None


def _trainer(trial: Trial, evaluator: Evaluator, folder: Path, place: Place | None) -> pl.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    train = trial.train
    gpu = torch.cuda.is_available()
    bf16 = train.precision == "bf16" or (train.precision == "auto" and gpu)
    return pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=train.devices,
        strategy=ranks.strategy(place, train) if place else "auto",
        max_steps=train.steps,
        max_epochs=-1,
        precision="bf16-mixed" if bf16 else "32-true",
        accumulate_grad_batches=train.accumulate,
        callbacks=[evaluator],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def _write_usage(evaluator: Evaluator, folder: Path) -> None:
    tables = {USAGE: evaluator.usage(), TREES: evaluator.trees()}
    if evaluator.trial.train.motion:
        tables[MOTION] = evaluator.motion()
    if evaluator.windows.table is not None:
        tables[WINDOWS] = evaluator.windows.table
    for name, table in tables.items():
        with replacing(folder / name) as partial:
            table.write_parquet(partial)
    shutil.rmtree(folder / USAGE_PARTS, ignore_errors=True)


def _provenance(trial: Trial, task: TrialTask, device: torch.device) -> Provenance:
    commit, dirty = _git()
    names = ("ablate", "torch", "numba", "lightning", "numpy", "tokenizers", "triton")
    versions = {"python": platform.python_version()} | {n: v for n in names if (v := _version(n))}
    return Provenance(
        git_commit=commit,
        git_dirty=dirty,
        data_hash=str(task.card["data_hash"]),
        tokenizer_hash=str(task.card["tokenizer_hash"]),
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        threads=torch.get_num_threads(),
        device=device.type,
        versions=versions,
        route_table=_route_table(trial, device),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str, bool]:
    """Commit of the code that runs and whether it was changed; empty outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", here, *arguments], capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return (commit, bool(git("status", "--porcelain", "--", str(here)))) if commit else ("", False)


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _route_table(trial: Trial, device: torch.device) -> str:
    """Return what decided how the tree layers are computed on a device."""
    if trial.model.feedforward != "tree":
        return REFERENCE
    name = choose(trial.train.backend, device, torch.float32)
    return REFERENCE if name == REFERENCE else load(name).version()
