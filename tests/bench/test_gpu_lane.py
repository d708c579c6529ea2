"""`make gpu` without a GPU: the program runs on a bare Python, keeps what fails, and shows what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ablate.bench.gpu.lane import Outcome, Rows, Section, Setup, run_all
from ablate.bench.gpu.page import page

BARE = """
import runpy, sys
absent = {"pydantic", "numba", "lightning", "rich", "typer", "polars", "mlflow", "optuna", "matplotlib", "datasets", "yaml"}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ImportError(f"{name} is not on a bare machine")
sys.meta_path.insert(0, Finder())
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("ablate.bench.gpu", run_name="__main__")
"""
DRY = Setup(device="cpu", dry=True)


@pytest.mark.soak_short
def test_the_lane_runs_on_a_python_that_has_pytorch_and_triton_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path / "out"), "--dry-run", "--minutes", "30"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    sections = {s["name"]: s for s in record["sections"]}
    assert [s for s in sections.values() if s["error"] or not s["rows"]] == []
    assert {row["strategy"] for row in sections["correctness"]["rows"]} == {"tiles", "gather", "masked"}
    assert {"tree", "dense_total", "ultrafastbert", "moe_grouped"} <= {
        row["contender"] for row in sections["contenders"]["rows"]
    }
    assert not any("error" in row for s in sections.values() for row in s["rows"])
    text = (tmp_path / "out" / "index.html").read_text()
    assert all(s["title"] in text for s in sections.values())


def test_without_a_gpu_the_lane_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = subprocess.run(
        [sys.executable, "-m", "ablate.bench.gpu", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "no CUDA or ROCm device is here; --dry-run tests the program without one"
    assert not (tmp_path / "out").exists()


def test_a_section_that_fails_is_kept_and_the_next_one_runs() -> None:
    def breaks(setup: Setup) -> Rows:
        raise RuntimeError("illegal memory access\nand more lines")

    def works(setup: Setup) -> Rows:
        return [{"what": "copy", "seconds": 1e-3}]

    sections = [
        Section(name="a", title="A", run=breaks, seconds=0),
        Section(name="b", title="B", run=works, seconds=0),
        Section(name="c", title="C", run=works, seconds=1e6),
    ]
    first, second, third = run_all(sections, DRY, minutes=1)
    assert first.error == "RuntimeError: illegal memory access"
    assert (second.error, second.rows) == ("", [{"what": "copy", "seconds": 1e-3}])
    assert third.error.startswith("not begun: it takes about 1000000 s")
    assert third.rows == []


def test_the_page_shows_times_fractions_and_what_is_wrong() -> None:
    rows: Rows = [
        {"contender": "tree", "seconds": 2e-5, "times_tree": 1.0, "of_copy": 0.5, "right": True},
        {"contender": "<b>", "seconds": 4e-5, "times_tree": 2.0, "of_copy": None, "right": False},
    ]
    html = page({"device": "GPU"}, [Outcome(name="contenders", title="Layers", rows=rows, seconds=1.0)])
    for shown in ("20.0 µs", "50.0%", "&lt;b&gt;", "<td class='bad'>NO</td>", "<td>–</td>"):
        assert shown in html, shown
    assert "<b>" not in html
