"""SIGKILL to every command, or to a process that it started, at random moments: called again it gives the same bytes.

Kills of running studies, servers and disks are in tests/e2e/test_kills; ABLATE_KILLS counts both.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import psutil
import pytest

from ablate.files import PARTIAL
from tests.e2e.test_kills import KILLS, SEED, SHARES
from tests.e2e.test_pipeline import ENVIRONMENT, TINY
from tests.e2e.test_stops import ABLATE, ROOT, started
from tests.results.grown import grow
from tests.study.test_runner import table

COMMANDS = {
    "prepare studies/tiny.yaml": ["data"],
    "study run studies/tiny.yaml": ["results/tiny", "state/finished"],
    "collect grown": ["tables/grown"],
    "analyse grown": ["out/grown/findings.json", "out/grown/metrics.json"],
    "report grown": ["out/grown"],
    "export grown": ["out/grown/csv"],
    "publish grown": ["reports/grown"],
    "figures": ["reports/grown/figures"],
    "doctor --fix": [],
}
"""Each command, in the order of the pipeline, and what it makes, which is taken away before it runs."""
WHOM = ("command", "child", "all")


def run(root: Path, command: str) -> float:
    """Run a command to its end; how long it took."""
    began = time.monotonic()
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*ABLATE, *command.split()], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return time.monotonic() - began


def kill(root: Path, command: str, after: float, whom: str) -> bool:
    """Start a command and kill it, one of its children or all of them; whether it still ran. Nothing of it stays."""
    mark = uuid.uuid4().hex
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "STOP_MARK": mark}
    process = subprocess.Popen(
        [*ABLATE, *command.split()],
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        landed = True
    else:
        landed = False
    children = [p for p in started(mark) if p.pid != process.pid]
    if whom == "child" and children:
        children[-1].kill()
    elif whom == "all" and landed:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait(timeout=120)
    _, alive = psutil.wait_procs(started(mark), timeout=10)
    assert not alive, f"{alive} outlived {command}"
    return landed


def content(root: Path) -> dict[str, str]:
    """Digests of all that the commands made for people; what a trial took is another each time, and compared apart."""
    places = [root / name for name in ("data", "tables", "out", "reports")]
    paths = sorted(p for place in places for p in place.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def trials(root: Path) -> object:
    """Results of the study that is run, without times."""
    changing = {"seconds", "tokens_per_second"}
    found = {name: {k: v for k, v in one.items() if k not in changing} for name, one in table(root, "tiny").items()}
    for one in found.values():
        one["history"] = [{k: v for k, v in e.items() if k != "seconds"} for e in one["history"]]
    return found


@pytest.mark.soak
@pytest.mark.soak_short
@pytest.mark.timeout(3600)
def test_killed_commands_give_the_same_bytes_when_called_again(tmp_path: Path, fresh_store: Path) -> None:
    root, generator = tmp_path / "project", random.Random(f"{SEED} commands")
    (root / "state").mkdir(parents=True)
    shutil.copyfile(fresh_store, root / "state" / "mlflow.db")
    grow(root, 2)
    (root / "studies" / "tiny.yaml").write_text(TINY)
    lasts = {command: run(root, command) for command in COMMANDS}
    before, results = content(root), trials(root)
    wanted, landed = math.ceil(KILLS * SHARES["commands"]), list[str]()
    deck = [(command, whom) for command in COMMANDS for whom in WHOM]
    while len(landed) < wanted:
        for command, whom in generator.sample(deck, min(len(deck), wanted - len(landed))):
            for made in COMMANDS[command]:
                place = root / made
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
            if kill(root, command, generator.uniform(0, lasts[command]), whom):
                landed.append(f"{command} ({whom})")
            run(root, command)
            if command == "report grown":
                run(root, "export grown")  # in the folder that was taken away
            assert content(root) == before, f"after a kill of {command} ({whom})"
            assert trials(root) == results
    run(root, "doctor --fix")
    assert run(root, "doctor")
    assert not list(root.rglob(f".*{PARTIAL}"))
    print(f"commands: survived {len(landed)}: {', '.join(landed)}")
