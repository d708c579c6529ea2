"""Ctrl-C and SIGTERM at any moment end every command in seconds, with a line, and leave no process and no half of a file."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from ablate.files import PARTIAL
from tests.e2e.test_pipeline import ENVIRONMENT, TINY, make_project
from tests.results.grown import grow

ROOT = Path(__file__).parents[2]
SLOWER = float(os.environ.get("ABLATE_SLOWER", "1"))
"""How much slower than a machine of one's own this one is."""
IDLE_SECONDS, TRAINING_SECONDS, ORPHAN_SECONDS = 5 * SLOWER, 15 * SLOWER, 2 * SLOWER
MOMENTS = int(os.environ.get("ABLATE_STOPS", "10"))
LONGEST = 30.0
"""Seconds at most in which moments are drawn."""
TRAINING = {"study run", "study run, preparing", "reproduce", "dvc repro"}
"""Commands that may have a trial in flight."""
ABLATE = [sys.executable, "-c", "from ablate.cli import main; main()"]
STUDY = [sys.executable, "-m", "tests.study.run"]
COMMANDS = {
    "study run": "study run studies/long.yaml --workers 2",
    "study run, preparing": "study run studies/text.yaml",
    "study plan": "study plan studies/tiny.yaml --set train.steps=50",
    "study status": "study status grown",
    "study promote": "study promote grown",
    "prepare": "prepare studies/text.yaml --force",
    "collect": "collect grown",
    "analyse": "analyse grown",
    "report": "report grown",
    "publish": "publish grown",
    "figures": "figures",
    "compare": "compare grown tiny",
    "export": "export grown",
    "doctor": "doctor",
    "ui": "ui --port 5913",
    "evaluate": "evaluate {trial} --tasks ''",
    "inspect": "inspect {trial}",
    "prune": "prune {trial} --threshold 0.4",
    "generate": "generate {trial} once --max-tokens 2000",
    "reproduce": "reproduce {trial}",
    "size": "size studies/tiny.yaml",
    "bench layer": "bench layer --growth",
    "bench trial": "bench trial",
    "bench search": "bench search",
    "bench decode": "bench decode",
    "dvc repro": "dvc repro -f",
}
FRESH = {
    "study run": ["results/long"],
    "study run, preparing": ["results/text", "state/finished", "data"],
    "study promote": ["studies/grown-confirm.yaml"],
}
"""What is taken away before a command runs again, so that it has all its work to do."""
LONG = TINY.replace("steps: 8", "steps: 4000").replace("eval_every: 4", "eval_every: 500")
TEXT = """
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
    """One signal to a command and all that it started, as a terminal sends it, and what came of it."""

    at: float
    number: int
    lasted: float = 0.0
    """Where the command ended before the signal: how long it took."""
    seconds: float = 0.0
    """From the signal to the end."""
    code: int = 0
    output: str = ""
    orphans: list[str] = field(default_factory=list)
    """What it had started and was there two seconds after its end."""
    left: list[str] = field(default_factory=list)
    """Files that are half written."""

    @property
    def ended(self) -> bool:
        """Whether the command was over before the signal."""
        return self.lasted > 0.0

    @property
    def interpreter(self) -> bool:
        """Whether the signal came while Python started, before any line of this project: it says so by its own traceback."""
        own = str(ROOT / "ablate")
        return self.code in {1, -self.number} and "ablate:" not in self.output and own not in self.output

    @property
    def line(self) -> str:
        """The last line that the command wrote about its end."""
        return next((x for x in reversed(self.output.splitlines()) if x.startswith("ablate: ")), "")


def started(mark: str) -> list[psutil.Process]:
    """Every process that was started with this mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("STOP_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def stopped(command: list[str], root: Path, at: float, number: int, *, after: str = "", twice: bool = False) -> Stop:
    """Start a command, send it and its children a signal `at` seconds later, and see how and when it ends.

    Seconds count from the line that holds `after`, where it is given.
    """
    mark, stop = uuid.uuid4().hex, Stop(at, number)
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "STOP_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while after and after not in process.stdout.readline():
        assert process.poll() is None
    began = time.monotonic()
    try:
        stop.output, _ = process.communicate(timeout=at)
        stop.lasted = time.monotonic() - began
    except subprocess.TimeoutExpired:
        began = time.monotonic()
        for _ in range(1 + twice):
            os.killpg(process.pid, number)
            time.sleep(0.2 if twice else 0)
        stop.output, _ = process.communicate(timeout=60)
        stop.seconds = time.monotonic() - began
    finally:
        process.kill()
    stop.code = process.returncode
    _, alive = psutil.wait_procs(started(mark), timeout=ORPHAN_SECONDS)
    for orphan in alive:
        with orphan.oneshot():
            stop.orphans.append(" ".join(orphan.cmdline())[:100])
        orphan.kill()
    stop.left = [str(p.relative_to(root)) for p in sorted(root.rglob(f".*{PARTIAL}"))]
    stop.left += [str(p.relative_to(root)) for p in sorted(root.glob("state/probes/*"))]
    return stop


def check(stop: Stop, most: float, codes: set[int], said: str = "") -> list[str]:
    """What is wrong with how a command ended; `said` is its last line where nobody stops it, and then it was done.

    Numbers in that line may differ: a plan measures what it forecasts.
    """
    wrong = []
    last = next(reversed(stop.output.splitlines()), "")
    done = stop.code == 0 and said != "" and re.sub(r"[\d.]+", "0", last) == re.sub(r"[\d.]+", "0", said)
    if not stop.ended and not stop.interpreter and not done:
        if stop.code not in codes:
            wrong.append(f"code {stop.code}")
        if stop.code == 128 + stop.number and not stop.line and codes == {128 + stop.number}:
            wrong.append("no line")
        if "Traceback" in stop.output:
            wrong.append("a traceback")
    if stop.seconds > most:
        wrong.append(f"{stop.seconds:.1f} s")
    return wrong + [f"orphan {o}" for o in stop.orphans] + [f"left {x}" for x in stop.left]


def fresh(root: Path, name: str) -> None:
    for made in FRESH.get(name, []):
        place = root / made
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def row(name: str, stops: list[Stop]) -> str:
    """What came of all signals to one command, as a row of a table."""
    landed = [s for s in stops if not s.ended]
    codes = " ".join("python" if s.interpreter and not s.ended else "ended" if s.ended else str(s.code) for s in stops)
    lines = sorted({s.line.removeprefix("ablate: ")[:60] for s in landed if s.line})
    longest = max((s.seconds for s in landed), default=0.0)
    orphans, left = sum(len(s.orphans) for s in stops), sum(len(s.left) for s in stops)
    return f"| {name} | {len(landed)} | {codes} | {longest:.1f} | {orphans} | {left} | {'; '.join(lines)} |"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with every kind of work: one trained study, one that would take long, one of a thousand trials, a large corpus."""
    root = make_project(tmp_path_factory.mktemp("stops") / "project", {"long": LONG}, git=True)
    (root / "texts").mkdir()
    words = random.Random(0).choices([f"w{i * i}" for i in range(4000)], k=400_000)
    for i in range(20):
        (root / "texts" / f"{i}.txt").write_text(" ".join(words[i * 20_000 : (i + 1) * 20_000]))
    (root / "studies" / "text.yaml").write_text(TEXT)
    return root


@pytest.fixture(scope="module")
def busy(project: Path) -> Path:
    """The same with what takes minutes to make: a trained study and one of a thousand trials, both collected and published."""
    (project / "studies" / "tiny.yaml").write_text(TINY)
    grow(project, 50)
    for name in ("tiny", "grown"):
        for verb in (["study", "run", "studies/tiny.yaml"], ["collect", name], ["report", name], ["publish", name]):
            subprocess.run([*ABLATE, *verb], cwd=project, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, check=True)
    return project


@pytest.mark.parametrize("name", ["doctor", "study run, preparing"])
def test_a_stop_ends_a_command_in_seconds(name: str, project: Path) -> None:
    number = signal.SIGINT if name == "doctor" else signal.SIGTERM
    stop = stopped([*ABLATE, *COMMANDS[name].split()], project, 1.0 if name == "doctor" else 2.0, number)
    assert check(stop, 2 * IDLE_SECONDS, {128 + number}) == []


@pytest.mark.parametrize("at", [0.15, 0.3, 0.6])
def test_ctrl_c_while_the_command_is_imported_is_a_line(at: float, tmp_path: Path) -> None:
    stop = stopped([*ABLATE, "study", "status", "nothing"], tmp_path, at, signal.SIGINT)
    assert check(stop, 2 * IDLE_SECONDS, {2, 130}) == []


def test_the_second_stop_ends_a_study_at_once(tmp_path: Path) -> None:
    stop = stopped([*STUDY, str(tmp_path), "1", "slow", "{}"], ROOT, 1.0, signal.SIGINT, after="starting", twice=True)
    assert stop.seconds <= 2 * ORPHAN_SECONDS
    assert stop.code == 130


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_in_seconds_at_random_moments(name: str, busy: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(busy, root, symlinks=True)
    trial = min((root / "results" / "tiny").glob("*[0-9a-f].json")).stem
    words = shlex.split(COMMANDS[name].format(trial=trial))
    command = words if words[0] == "dvc" else [*ABLATE, *words]
    codes = set(range(1, 256)) if words[0] == "dvc" else {128 + signal.SIGINT}
    whole = stopped(command, root, LONGEST, signal.SIGINT)
    fresh(root, name)
    lasts = whole.lasted or LONGEST
    generator = random.Random(name)
    stops = []
    for _ in range(MOMENTS):
        stops.append(stopped(command, root, generator.uniform(0, lasts), signal.SIGINT))
        fresh(root, name)
    print(row(name, stops))
    most = TRAINING_SECONDS if name in TRAINING else IDLE_SECONDS
    said = whole.output.splitlines()[-1] if whole.ended and whole.output else ""
    wrong = [(s.at, check(s, most, codes, said)) for s in stops]
    assert [w for w in wrong if w[1]] == []
