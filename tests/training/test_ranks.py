"""One trial in two processes (gloo) is the trial of the joined batch, and stops, resumes and fails as one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
import torch

from ablate.balance import usage
from ablate.config import Trial
from ablate.training.checkpoint import load_model
from ablate.training.result import Evaluation, TrialResult
from ablate.training.trial import run_trial
from tests.training.test_trial import StopAt, comparable, trial

TOLERANCE = 1e-5


def on_two(**train: object) -> Trial:
    """Everything that is summed over ranks: thresholds, running means, gradients over micro-batches."""
    return trial(
        tree={
            "routing": "centred",
            "router_input": "centred",
            "router": "frozen" if "router_steps" in train else "tied",
        },
        train={"devices": 2, "strategy": "ddp", "accumulate": 2, "keep_checkpoint": True, **train},
    )


WAYS: dict[str, dict[str, object]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "fsdp, all that reads whole weights": {
        "strategy": "fsdp",
        "decay_rows": "active",
        "node_lr_scale": 0.5,
        "router_steps": 5,
        "router_rate": 0.5,
        "motion": True,
        "activation_checkpointing": True,
    },
}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def run(config: Trial, data_root: Path, folder: Path, observer: StopAt | None = None) -> TrialResult:
    return run_trial(config, data_root=data_root, folder=folder, threads=2, observer=observer)


def counts(folder: Path, window: usage.Window) -> list[list[int]]:
    """Leaf counts of every evaluation, layer and tree."""
    frame = pl.read_parquet(folder / "usage.parquet").filter(pl.col("window") == window)
    found = usage.counts_from(frame, window)
    return found.reshape(-1, found.shape[-1]).tolist()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("way", "devices"),
    [pytest.param(way, n, marks=[pytest.mark.soak_short] * (n == 2)) for way in WAYS for n in (2, 4)],
)
def test_processes_equal_one_with_the_joined_batch(way: str, devices: int, data_root: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    config = {"batch_size": 2 * devices, **WAYS[way]}
    joined = run(on_two(devices=1, **config), data_root, one)
    split = run(on_two(devices=devices, **config), data_root, two)
    assert [e.step for e in split.history] == [e.step for e in joined.history] == [0, 4, 8, 12]
    for a, b in zip(joined.history, split.history, strict=True):
        assert b.bpb == pytest.approx(a.bpb, abs=TOLERANCE)
        assert b.train_loss == pytest.approx(a.train_loss, abs=TOLERANCE)
    assert joined.final.train_loss != joined.history[1].train_loss, "it trains"
    assert counts(two, "train") == counts(one, "train")
    assert counts(two, "held_out") == counts(one, "held_out")
    windows = [pl.read_parquet(folder / "windows.parquet") for folder in (one, two)]
    assert windows[1]["bytes"].to_list() == windows[0]["bytes"].to_list(), "in the order of the text"
    assert windows[1]["bits"].to_list() == pytest.approx(windows[0]["bits"].to_list(), rel=1e-3)
    (whole, _, _), (shared, _, _) = (load_model(folder / "model.pt") for folder in (one, two))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, rtol=0, atol=TOLERANCE, msg=name)
    assert all(tree.thresholds.abs().max() > 0 for tree in whole.trees()), "thresholds moved"


@pytest.mark.soak
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_stopped_and_resumed_on_two_processes(way: str, data_root: Path, tmp_path: Path) -> None:
    config = on_two(**WAYS[way])
    whole = run(config, data_root, tmp_path / "whole")
    killed = run(config, data_root, tmp_path / "parts", StopAt(5))
    assert (killed.status, killed.message) == ("killed", "stopped when asked, after step 5")
    resumed = run(config, data_root, tmp_path / "parts")
    assert comparable(resumed) == comparable(whole)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("first", "second"), [((2, "fsdp"), (1, "auto")), ((1, "auto"), (2, "fsdp")), ((2, "fsdp"), (4, "fsdp"))]
)
def test_a_sharded_run_goes_on_with_another_number_of_processes(
    first: tuple[int, str], second: tuple[int, str], data_root: Path, tmp_path: Path
) -> None:
    configs = [on_two(batch_size=8, devices=n, strategy=way) for n, way in (first, second)]
    whole = run(on_two(batch_size=8, devices=1, strategy="auto"), data_root, tmp_path / "whole")
    assert run(configs[0], data_root, tmp_path / "parts", StopAt(5)).status == "killed"
    watching = StopAt(99)
    resumed = run(configs[1], data_root, tmp_path / "parts", watching)
    assert watching.seen == [8, 12], "it went on"
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert b.bpb == pytest.approx(a.bpb, abs=TOLERANCE)
        assert b.train_loss == pytest.approx(a.train_loss, abs=TOLERANCE)
    models = [load_model(tmp_path / name / "model.pt")[0].state_dict() for name in ("whole", "parts")]
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.soak
def test_a_process_that_dies_ends_the_trial_and_its_checkpoint_stays(data_root: Path, tmp_path: Path) -> None:
    class Murderer(StopAt):
        def stepped(self, step: int, total: int) -> bool:
            if step == self.step:
                (other,) = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
                os.kill(other.pid, signal.SIGKILL)
            return False

    with pytest.raises(RuntimeError):
        run(on_two(), data_root, tmp_path, Murderer(7))
    watching = StopAt(99)
    assert run(on_two(), data_root, tmp_path, watching).status == "finished"
    assert watching.seen == [8, 12], "it went on from the checkpoint of step 6"


def test_seconds_count_every_attempt(data_root: Path, tmp_path: Path) -> None:
    class Tired(StopAt):
        def evaluated(self, evaluation: Evaluation) -> bool:
            time.sleep(0.5)
            return super().evaluated(evaluation)

    config = trial()
    first = run(config, data_root, tmp_path, Tired(5))
    second = run(config, data_root, tmp_path, Tired(99))
    assert first.seconds > 1.0
    assert second.seconds > first.seconds + 1.0
