"""run_trial on real text: exact repeats, exact resumption, honest endings."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from ablate.config import Trial
from ablate.evaluation.bits_per_byte import WINDOWS_SCHEMA
from ablate.training.checkpoint import load_model
from ablate.training.result import Evaluation, TrialResult
from ablate.training.trial import run_trial

BASE: dict[str, dict[str, object]] = {
    "corpus": {"max_documents": 40, "vocab_size": 300},
    "model": {"d_model": 16, "blocks": 2, "heads": 2, "context": 32},
    "tree": {"trees": 2, "depth": 3, "leaf_width": 2},
    "train": {"steps": 12, "batch_size": 4, "eval_every": 4, "eval_tokens": 2048, "checkpoint_every": 3},
}


def trial(**changes: dict[str, object]) -> Trial:
    return Trial.model_validate({k: {**v, **changes.get(k, {})} for k, v in BASE.items()})


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def run(data_root: Path, tmp_path: Path) -> Callable[..., TrialResult]:
    folders = iter(range(1000))

    def call(config: Trial, folder: Path | None = None, **keywords: Any) -> TrialResult:
        where = folder or tmp_path / f"t{next(folders)}"
        return run_trial(config, data_root=data_root, folder=where, threads=1, **keywords)

    return call


class StopAt:
    """Asks to stop, as SIGTERM does, after a given step."""

    def __init__(self, step: int, *, prune: bool = False) -> None:
        self.step, self.prune = step, prune
        self.seen: list[int] = []

    def evaluated(self, evaluation: Evaluation) -> bool:
        self.seen.append(evaluation.step)
        return self.prune and evaluation.step >= self.step

    def stepped(self, step: int, total: int) -> bool:
        assert total == 12
        return not self.prune and step == self.step


def comparable(result: TrialResult) -> list[dict[str, object]]:
    return [e.model_dump(exclude={"seconds"}) for e in result.history]


RICH = {
    "tree": {"routing": "centred", "router_input": "centred"},
    "train": {"decay_rows": "active", "region_leak": 0.05},
}


@pytest.mark.parametrize("changes", [{}, RICH], ids=["plain", "stateful-routing-and-random-leak"])
def test_a_resumed_run_equals_one_never_stopped(
    changes: dict[str, dict[str, object]], run: Callable[..., TrialResult], tmp_path: Path
) -> None:
    config = trial(**{**changes, "train": {**changes.get("train", {}), "keep_checkpoint": True}})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = run(config, whole)
    for step in (5, 10):
        killed = run(config, parts, observer=StopAt(step))
        assert killed.status == "killed"
        assert killed.message == f"stopped when asked, after step {step}"
    resumed = run(config, parts)
    assert resumed.status == uninterrupted.status == "finished"
    assert comparable(resumed) == comparable(uninterrupted)
    assert_frame_equal(pl.read_parquet(whole / "usage.parquet"), pl.read_parquet(parts / "usage.parquet"))
    (a, trial_a, _), (b, trial_b, _) = (load_model(f / "model.pt") for f in (whole, parts))
    assert trial_a == trial_b == config
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not (parts / "last.ckpt").exists()


def test_a_hard_kill_costs_the_steps_since_the_last_checkpoint_only(
    run: Callable[..., TrialResult], tmp_path: Path
) -> None:
    class Dies(StopAt):
        def stepped(self, step: int, total: int) -> bool:
            if step == self.step:
                raise SystemExit(9)
            return False

    with pytest.raises(SystemExit):
        run(trial(), tmp_path / "t", observer=Dies(8))
    watching = StopAt(99)
    resumed = run(trial(), tmp_path / "t", observer=watching)
    assert watching.seen == [8, 12]
    assert comparable(resumed) == comparable(run(trial()))


def flipped(place: float) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        at = int(len(content) * place)
        return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]

    return flip


CHECKPOINTS: dict[str, Callable[[bytes], bytes]] = {
    "a bit early": flipped(0.2),
    "a bit in the middle": flipped(0.5),
    "a bit late": flipped(0.8),
    "cut by half": lambda content: content[: len(content) // 2],
    "cut by ten bytes": lambda content: content[:-10],
    "zeros": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
    "text": lambda content: b"no checkpoint\n",
    "a foreign pickle": lambda content: pickle.dumps({"a": 1}),
    "an evil pickle": lambda content: b"cos\nsystem\n(S'touch evil'\ntR.",
}


def test_a_damaged_checkpoint_is_set_aside_and_the_trial_goes_on_from_the_start(
    run: Callable[..., TrialResult], tmp_path: Path
) -> None:
    config, folder = trial(), tmp_path / "t"
    whole = comparable(run(config))
    assert run(config, folder, observer=StopAt(10)).status == "killed"
    good = (folder / "last.ckpt").read_bytes()
    parts = {p.name: p.read_bytes() for p in (folder / "usage").iterdir()}

    def again() -> list[int]:
        watching = StopAt(99)
        assert comparable(run(config, folder, observer=watching)) == whole
        return watching.seen

    def restore() -> None:
        (folder / "usage").mkdir(exist_ok=True)
        for name, content in parts.items():
            (folder / "usage" / name).write_bytes(content)
        (folder / "last.ckpt").write_bytes(good)

    for name, damage in CHECKPOINTS.items():
        restore()
        (folder / "last.ckpt").write_bytes(damage(good))
        assert again() == [0, 4, 8, 12], name
        assert (folder / "last.ckpt.damaged").exists(), name
    restore()
    torch.save({"global_step": 3}, folder / "last.ckpt")
    assert again() == [0, 4, 8, 12]
    restore()
    part = min((folder / "usage").glob("*.leaves.npy"))
    part.write_bytes(part.read_bytes()[:-40])
    assert again() == [0, 4, 8, 12]
    restore()
    assert again() == [12], "a whole one is gone on from"
    assert not Path("evil").exists()


def test_the_same_trial_twice_is_the_same_bit_for_bit(run: Callable[..., TrialResult]) -> None:
    first, second = run(trial()), run(trial())
    assert comparable(first) == comparable(second)
    assert [e.step for e in first.history] == [0, 4, 8, 12]
    assert first.final.bpb is not None
    assert first.history[0].bpb is not None
    assert first.final.bpb < first.history[0].bpb
    assert comparable(run(trial().model_copy(update={"data_seed": 1}))) != comparable(first)


def test_identity_activation_is_one_model_at_every_placement(run: Callable[..., TrialResult]) -> None:
    histories = [comparable(run(trial(tree={"mirror": -1.0, "placement": p}))) for p in ("unit", "tree", "sum")]
    assert histories[0] == histories[1] == histories[2]


def test_accumulation_gives_the_step_of_the_whole_batch(run: Callable[..., TrialResult]) -> None:
    whole = run(trial(train={"weight_decay": 0.0}))
    split = run(trial(train={"weight_decay": 0.0, "accumulate": 4}))
    assert split.final.tokens == whole.final.tokens
    assert split.final.bpb == pytest.approx(whole.final.bpb, rel=1e-3)


def test_divergence_ends_cleanly_with_its_history(run: Callable[..., TrialResult], tmp_path: Path) -> None:
    result = run(
        trial(train={"lr": 10.0, "grad_clip": 1e30, "warmup": 0.0, "weight_decay": 10.0}, tree={"activation": "relu2"}),
        tmp_path / "t",
    )
    assert result.status == "diverged"
    assert "not finite at step" in result.message
    assert result.history[0].bpb is not None
    assert result.final.bpb is None
    assert TrialResult.model_validate_json(result.model_dump_json()) == result
    assert (tmp_path / "t" / "usage.parquet").exists()


def test_pruned_when_the_observer_says_so(run: Callable[..., TrialResult]) -> None:
    result = run(trial(), observer=StopAt(4, prune=True))
    assert (result.status, result.final.step) == ("pruned", 4)


@pytest.mark.parametrize("feedforward", ["dense", "none", "moe"])
def test_controls_run_through_the_same_path(feedforward: str, run: Callable[..., TrialResult], tmp_path: Path) -> None:
    result = run(trial(model={"feedforward": feedforward}), tmp_path / feedforward)
    assert result.status == "finished"
    assert result.final.balance == {}
    assert pl.read_parquet(tmp_path / feedforward / "usage.parquet").height == 0


def test_usage_counts_every_held_out_token_once(run: Callable[..., TrialResult], tmp_path: Path) -> None:
    run(trial(), tmp_path / "t")
    usage = pl.read_parquet(tmp_path / "t" / "usage.parquet").filter(pl.col("window") == "held_out")
    per_level = usage.group_by("step", "layer", "tree", "level").agg(pl.col("count").sum())
    assert per_level["count"].unique().to_list() == [2048]
    assert per_level.height == 4 * 2 * 2 * 4


def test_windows_of_the_last_evaluation_add_up_to_its_quality(run: Callable[..., TrialResult], tmp_path: Path) -> None:
    folder = tmp_path / "t"
    result = run(trial(), folder)
    table = pl.read_parquet(folder / "windows.parquet")
    assert dict(table.schema) == WINDOWS_SCHEMA
    assert table["window"].to_list() == list(range(2048 // 32))
    assert sum(table["bits"].to_list()) / sum(table["bytes"].to_list()) == pytest.approx(result.final.bpb, rel=1e-6)
    assert (folder / "windows.parquet").stat().st_size < 4000


def test_results_do_not_depend_on_evaluation(run: Callable[..., TrialResult]) -> None:
    often, rarely = run(trial(train={"eval_every": 1})), run(trial(train={"eval_every": 12}))
    assert often.final.bpb == rarely.final.bpb
