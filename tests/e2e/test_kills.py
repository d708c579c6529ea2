"""Studies under fire: processes and servers killed, disks filled at random moments, and nothing lost or doubled.

ABLATE_KILLS is how many times in all (40); tests/e2e/test_command_kills adds half as many. ABLATE_KILL_SEED draws other moments.
"""

from __future__ import annotations

import errno
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from ablate.results.layout import Layout
from ablate.results.record import load_record
from ablate.study.designs import expand
from ablate.study.outcome import Outcome
from ablate.study.runner import run_study
from ablate.tracking import tags
from ablate.tracking.doctor import doctor
from ablate.tracking.store import default_uri
from tests.study import objective
from tests.study.test_runner import table
from tests.tracking.server import Server

ROOT = Path(__file__).parents[2]
KILLS, SEED = int(os.environ.get("ABLATE_KILLS", "40")), os.environ.get("ABLATE_KILL_SEED", "0")
SHARES = {"processes": 0.4, "server": 0.35, "full disk": 0.25, "commands": 0.5}
KILLS_A_ROUND = 5
DISK = "48m"
PROCESSES = ("worker", "parent", "all", "polite")

Hit = Callable[["Round"], None]


class Round:
    """A study that is run again and again until a run of it ends by itself with every trial done."""

    def __init__(self, root: Path, uri: str, generator: random.Random, deck: list[str], log: Path) -> None:
        self.root, self.uri, self.generator, self.deck, self.log = root, uri, generator, deck, log
        self.hits: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def finish(self, kinds: dict[str, Hit], kills: int) -> None:
        """Hit it `kills` times at most, with every kind once before any comes again, then let it end."""
        command = [sys.executable, "-m", "tests.study.run", str(self.root), "2", "slow", "{}", self.uri]
        for _ in range(40):
            began = time.time()
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            try:
                while len(self.hits) < kills and self._moment(began):
                    if not self.deck:
                        self.deck += self.generator.sample(sorted(kinds), len(kinds))
                    self.hits.append(self.deck.pop())
                    kinds[self.hits[-1]](self)
                if self.process.wait(timeout=120) == 0 and len(Layout(self.root, "cheap").done()) == 8:
                    return
            except subprocess.TimeoutExpired:
                raise AssertionError(f"the study hangs after {self.hits}\n{self.log.read_text()[-3000:]}") from None
            finally:
                self.process.kill()
        raise AssertionError(f"the study never finished: {self.hits}\n{self.log.read_text()[-3000:]}")

    def _moment(self, began: float) -> bool:
        """Wait for a random moment, three times in four one at which trials train; False where the run ended first."""
        assert self.process is not None
        training = self.generator.random() < 0.75
        delay = self.generator.uniform(0, 4 if training else 12)
        while training and self.process.poll() is None and not self._trains(began):
            time.sleep(0.05)
        end = time.monotonic() + delay
        while self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        return self.process.poll() is None

    def _trains(self, began: float) -> bool:
        try:
            return any(p.stat().st_mtime > began for p in self.root.glob("state/trials/*/last.json"))
        except OSError:
            return False  # It was removed between the two looks.


def kill_processes(whom: str) -> Hit:
    """SIGKILL to one worker, to the parent, to all, or a polite SIGTERM to the parent."""

    def hit(one: Round) -> None:
        assert one.process is not None
        try:
            children = psutil.Process(one.process.pid).children()
        except psutil.NoSuchProcess:
            return
        workers = [p for p in children if "spawn_main" in " ".join(p.cmdline())]
        for worker in workers if whom == "all" else workers[:1] if whom == "worker" else []:
            worker.kill()
        if whom in {"parent", "all"}:
            one.process.kill()
        if whom == "polite":
            one.process.send_signal(signal.SIGTERM)
        if whom != "worker":
            one.process.wait(timeout=60)
            _, left = psutil.wait_procs(workers, timeout=60)
            assert not left, "workers end with their parent"

    return hit


def restart(server: Server) -> Hit:
    """SIGKILL to the MLflow server, which comes back some seconds later."""

    def hit(one: Round) -> None:
        server.kill()
        time.sleep(one.generator.uniform(0, 5))
        server.start()

    return hit


def fill(one: Round) -> None:
    """Not one byte is free under the root for some seconds."""
    filler = one.root / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        time.sleep(one.generator.uniform(0.5, 5))
    finally:
        filler.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def place(kind: str, folder: Path, store: Path) -> Iterator[tuple[Path, str, dict[str, Hit]]]:
    """A project's root, its tracking URI, and what may hit a study there."""
    processes = {whom: kill_processes(whom) for whom in PROCESSES}
    if kind == "full disk":
        with small_disk(folder) as root:
            _with_store(root, store)
            yield root, default_uri(root), {"disk": fill, "all": processes["all"]}
    elif kind == "server":
        served = folder.with_name(f"{folder.name}-served")
        _with_store(served, store)
        server = Server(served)
        server.start()
        try:
            yield (
                folder,
                server.uri,
                {"server": restart(server), "worker": processes["worker"], "parent": processes["parent"]},
            )
        finally:
            server.kill()
    else:
        _with_store(folder, store)
        yield folder, default_uri(folder), processes


def _with_store(root: Path, store: Path) -> None:
    (root / "state").mkdir(parents=True)
    shutil.copyfile(store, root / "state" / "mlflow.db")


@pytest.mark.soak
@pytest.mark.soak_short
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["processes", "server", "full disk"])
def test_random_kills_lose_and_double_nothing(kind: str, tmp_path: Path, fresh_store: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert run_study(objective.study(), undisturbed, run=objective.descend) == Outcome(8, 8)
    generator = random.Random(f"{SEED} {kind}")
    survived: list[str] = []
    deck: list[str] = []
    rounds, wanted = 0, math.ceil(KILLS * SHARES[kind])
    while len(survived) < wanted:
        rounds += 1
        with place(kind, tmp_path / f"round{rounds}", fresh_store) as (root, uri, kinds):
            one = Round(root, uri, generator, deck, tmp_path / f"round{rounds}.log")
            one.finish(kinds, min(KILLS_A_ROUND, wanted - len(survived)))
            assert table(root) == table(undisturbed)
            check_runs(root, uri)
        survived += one.hits
    print(f"{kind}: survived {len(survived)} in {rounds} rounds: {' '.join(survived)}")


def check_runs(root: Path, uri: str) -> None:
    """Exactly one finished run a trial, every evaluation once, nothing RUNNING after doctor."""
    doctor(root, fix=True, tracking=uri)
    assert doctor(root, tracking=uri) == []
    client, layout = MlflowClient(uri), Layout(root, "cheap")
    experiment = client.get_experiment_by_name("cheap")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {r.info.status for r in runs} == {"FINISHED"}
    children = [r for r in runs if r.data.tags[tags.ROLE] == "trial"]
    assert sorted(r.data.tags[tags.TRIAL] for r in children) == sorted(t.hash for t in expand(objective.study()).trials)
    for run in children:
        record = load_record(layout.record(run.data.tags[tags.TRIAL]))
        for key in ("bpb", "n_eff_frac"):
            logged = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            values = [(e.step, e.bpb if key == "bpb" else e.balance[key]) for e in record.history]
            assert sorted(logged) == values
