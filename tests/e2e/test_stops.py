"""Ctrl-C and SIGTERM at any moment end every command in seconds, with a line, and leave no process and no half of a file."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ablate.files import leftovers
from ablate.results.layout import Layout
from ablate.study.outcome import Outcome
from ablate.study.runner import run_study
from tests.report.synthetic import write_study
from tests.study import objective

ROOT = Path(__file__).parents[2]
SLOWER = float(os.environ.get("ABLATE_SLOWER", "1"))
"""How much slower than a machine of one's own this one is."""
IDLE_SECONDS, TRAINING_SECONDS, ORPHAN_SECONDS = 5 * SLOWER, 15 * SLOWER, 2 * SLOWER
MOMENTS = int(os.environ.get("ABLATE_STOPS", "10"))
ABLATE = [sys.executable, "-c", "from ablate.cli import main; main()"]
STUDY = [sys.executable, "-m", "tests.study.run"]
COMMANDS: dict[str, list[str]] = {
    "study status": [*ABLATE, "study", "status", "cheap"],
    "doctor": [*ABLATE, "doctor"],
    "collect": [*ABLATE, "collect", "cheap"],
    "analyse": [*ABLATE, "analyse", "demo"],
    "report": [*ABLATE, "report", "demo"],
    "publish": [*ABLATE, "publish", "demo"],
    "figures": [*ABLATE, "figures"],
    "prepare": [*ABLATE, "prepare", "studies/text.yaml", "--force"],
    "study plan": [*ABLATE, "study", "plan", "studies/text.yaml"],
    "ui": [*ABLATE, "ui", "--port", "5913"],
    "study run, preparing": [*ABLATE, "study", "run", "studies/text.yaml"],
    "study run, training": [*STUDY, ".", "2", "slow", '{"name": "fresh"}'],
}
TEXT_STUDY = """
base:
  corpus: {source: files, path: texts, vocab_size: 2048}
  model: {d_model: 32, blocks: 1, heads: 2, context: 32}
  tree: {trees: 2, depth: 2, leaf_width: 2}
  train: {steps: 400, batch_size: 4, eval_every: 100, eval_tokens: 1024, checkpoint_every: 100}
factors: {tree.mirror: [0]}
seeds: [0]
"""


@dataclass
class Stop:
    """One signal to one command."""

    at: float
    seconds: float
    """From the signal to the end."""
    code: int
    output: str


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stops")
    assert run_study(objective.study(seeds=[0]), root, run=objective.descend) == Outcome(4, 4)
    write_study(root, seeds=(0, 1, 2), usage=2)
    (root / "texts").mkdir()
    words = random.Random(0).choices([f"w{i * i}" for i in range(4000)], k=400_000)
    for i in range(20):
        (root / "texts" / f"{i}.txt").write_text(" ".join(words[i * 20_000 : (i + 1) * 20_000]))
    (root / "studies" / "text.yaml").write_text(TEXT_STUDY)
    return root


def stopped(command: list[str], root: Path, at: float, number: int, *, twice: bool = False) -> Stop:
    """Start a command, send it a signal after `at` seconds, and see how and when it ends."""
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(at)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    began = time.monotonic()
    process.send_signal(number)
    if twice:
        time.sleep(0.2)
        process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    seconds = time.monotonic() - began
    _, alive = psutil.wait_procs(children, timeout=ORPHAN_SECONDS)
    assert not alive, f"{alive} outlived {command[2:]}"
    return Stop(at, seconds, process.returncode, output)


def look(root: Path, stop: Stop, number: int, most: float) -> None:
    # Python itself answers a signal that comes before any line of this project has run.
    early = stop.code == -number or "stopped before anything" in stop.output
    assert early or stop.code in {0, 1, 128 + number}, stop.output
    if stop.code == 128 + number and not early:
        assert "kept" in stop.output or "SIG" in stop.output, stop.output
    assert "Traceback" not in stop.output or "<frozen site>" in stop.output, stop.output
    assert stop.seconds <= most, f"{stop.seconds:.1f} s after {stop.at:.1f} s\n{stop.output}"
    assert not leftovers(root / "reports")


@pytest.mark.parametrize("name", ["doctor", "study run, preparing"])
def test_a_stop_ends_a_command_in_seconds(name: str, project: Path) -> None:
    number = signal.SIGINT if name == "doctor" else signal.SIGTERM
    look(project, stopped(COMMANDS[name], project, 2.0, number), number, 2 * IDLE_SECONDS)


def test_the_second_stop_ends_a_study_at_once(tmp_path: Path) -> None:
    stop = stopped([*STUDY, str(tmp_path), "1", "slow", "{}"], ROOT, 6.0, signal.SIGINT, twice=True)
    assert stop.seconds <= 2 * ORPHAN_SECONDS
    assert stop.code in {130, -signal.SIGINT}, "the second may come when Python is on its way out"


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_in_seconds_at_random_moments(name: str, project: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(project, root)
    if name == "figures":
        subprocess.run(COMMANDS["publish"], cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    generator = random.Random(name)
    most = TRAINING_SECONDS if "training" in name else IDLE_SECONDS
    stops = []
    for i in range(MOMENTS):
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        stops.append(stopped(COMMANDS[name], root, generator.uniform(0.3, 12), number))
        look(root, stops[-1], number, most)
        if "training" in name:
            shutil.rmtree(Layout(root, "fresh").results, ignore_errors=True)
    landed = sorted(s.seconds for s in stops if s.code not in {0, 1})
    codes = " ".join(str(s.code) for s in stops)
    longest = f"{landed[-1]:.1f}" if landed else "-"
    print(f"| {name} | {len(landed)} | {landed[len(landed) // 2] if landed else 0:.1f} | {longest} | {codes} |")
