"""Studies from Python: frames of own and of published results, and exports that other programs read."""

from __future__ import annotations

import math
import shutil
import struct
from pathlib import Path

import polars as pl
import pytest

import ablate
from ablate import api
from ablate.config import ConfigError
from ablate.report.published import publish
from ablate.results.export import to_tensorboard
from tests.report.synthetic import write_study


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    write_study(folder, factors={"tree.mirror": [0.0, 1.0]}, controls=False, tune=False, usage=1, diverged=False)
    (folder / "results/demo/plan.json").rename(folder / "plan.json")  # tables alone: results would be collected again
    return folder


def test_results_are_frames(root: Path) -> None:
    results = ablate.load("demo", root)
    assert set(results.trials["arm"]) == {"tree.mirror=0.0", "tree.mirror=1.0"}
    assert results.history.height > results.trials.height
    assert results.verdicts.columns[:4] == ["family", "arm_label", "reference_label", "endpoint"]
    assert set(results.verdicts["verdict"]) <= {"supported", "refuted", "inconclusive"}
    assert results.verdicts["low"].null_count() == 0


def test_balance_of_a_tree_is_that_of_its_leaves(root: Path) -> None:
    balance = ablate.load("demo", root).balance
    usage = pl.read_parquet(root / "tables/demo/usage.parquet")
    row = balance.row(-1, named=True)
    place = [pl.col(k) == row[k] for k in ("trial", "step", "layer", "tree")]
    leaves = usage.filter(*place, pl.col("level") == pl.col("level").max(), pl.col("window") == "held_out")
    shares = [n / leaves["count"].sum() for n in leaves["count"]]
    entropy = -sum(p * math.log(p) for p in shares if p)
    assert row["n_eff_frac"] == pytest.approx(math.exp(entropy) / len(shares))
    assert row["dead_frac"] == pytest.approx(sum(p < 0.01 / len(shares) for p in shares) / len(shares))


def test_published_results_are_loaded_from_a_clone(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "own")
    (tmp_path / "own/plan.json").rename(tmp_path / "own/results/demo/plan.json")
    publish("demo", tmp_path / "own")
    shutil.copytree(tmp_path / "own/reports", tmp_path / "clone/reports")
    results = ablate.load("demo", tmp_path / "clone")
    assert results.trials.equals(ablate.load("demo", root).trials)
    assert results.verdicts.height
    with pytest.raises(ConfigError, match=r"mine\.yaml' does not exist"):
        ablate.load("mine", tmp_path / "clone")


def test_a_study_made_in_code_is_written_once(tmp_path: Path) -> None:
    study = ablate.Study(name="mine", factors={"tree.mirror": [0, 1]}, seeds=[0])
    other = ablate.Study(name="mine", factors={"tree.mirror": [0, 0.5]}, seeds=[0])
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/mine.yaml").write_text("factors: {tree.mirror: [0, 0.5]}\nseeds: [0]\n")
    with pytest.raises(ConfigError, match="has other settings: give the study another name"):
        api.run_study(study, tmp_path)
    assert ablate.Study.model_validate(other.model_dump()) == other


def test_tensorboard_reads_what_is_exported(tmp_path: Path) -> None:
    rows = {"trial": ["a", "a"], "arm": ["x y"] * 2, "seed": [3, 3], "step": [0, 300]}
    history = pl.DataFrame({**rows, "train_seconds": [0.0, 1.5], "bpb": [8.0, None]})
    [path] = to_tensorboard(history, tmp_path).rglob("events*")
    assert path.parent.name == "x-y-seed-3-a"
    records, content = [], path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        body, check = content[12 : 12 + length], content[12 + length : 16 + length]
        assert struct.unpack("<I", check)[0] == masked(body)
        assert struct.unpack("<I", content[8:12])[0] == masked(content[:8])
        records.append(body)
        content = content[16 + length :]
    assert len(records) == 3
    assert b"brain.Event:2" in records[0]
    assert b"\x0a\x03bpb\x15" + struct.pack("<f", 8.0) in records[1]
    assert b"\x10\xac\x02" in records[2], "step 300 as a varint"
    assert b"bpb" not in records[2]


def masked(content: bytes) -> int:
    """Return TensorFlow's masked CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        for bit in range(8):
            low = (crc ^ (byte >> bit)) & 1
            crc = (crc >> 1) ^ (0x82F63B78 if low else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_the_checksum_is_the_published_one() -> None:
    crc = ((masked(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF) << 15
    assert (crc | crc >> 32) & 0xFFFFFFFF == 0xE3069283
