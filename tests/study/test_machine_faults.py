"""What is the machine's fault, made with real disks and limits: the study pauses with one line, and no trial is lost by it.

ESTALE needs a network disk, so that only its number is tested; a tracking server that goes away is in tests/e2e/test_kills.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from ablate.files import machine_fault
from ablate.results.layout import Layout
from ablate.study.oom import oom_kills
from ablate.study.outcome import Outcome
from ablate.study.runner import run_study
from tests.study import objective
from tests.study.test_runner import table, wait_for

ROOT = Path(__file__).parents[2]
ALL = Outcome(8, 8)
Fault = Callable[[Path], AbstractContextManager[object]]


def call(*command: str | Path) -> None:
    """Call a program of the system's; skips where it is missing, or not permitted."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"there is no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} is not permitted: {done.stderr.strip()}")


@contextmanager
def mounted(folder: Path, *options: str | Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    call("mount", *options, folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def read_only(part: str) -> Fault:
    """EROFS: a folder is mounted over itself, and cannot be written to."""

    @contextmanager
    def fault(root: Path) -> Iterator[None]:
        with mounted(root / part, "--bind", root / part):
            call("mount", "-o", "remount,ro,bind", root / part)
            yield

    return fault


def small(part: str) -> Fault:
    """A disk of its own of a few megabytes."""
    return lambda root: mounted(root / part, "-t", "tmpfs", "-o", "size=6m", "tmpfs")


def write_on(file: io.FileIO, what: bytes) -> NoReturn:
    while True:
        file.write(what)


def full(part: str) -> Fault:
    """ENOSPC: nothing is free there."""

    @contextmanager
    def fault(root: Path) -> Iterator[None]:
        filler = root / part / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 16, 1):
                with pytest.raises(OSError, match="No space left"):
                    write_on(file, b"x" * size)
        yield
        filler.unlink()

    return fault


@contextmanager
def device(root: Path) -> Iterator[None]:
    """A file system on a file that promises more than the disk below it has."""
    with mounted(root.with_name("below"), "-t", "tmpfs", "-o", "size=6m", "tmpfs") as below:
        with (below / "image").open("wb") as file:
            file.truncate(24 << 20)
        call("mkfs.ext4", "-q", "-O", "^has_journal", below / "image")
        with mounted(root / "results", "-o", "loop", below / "image"):
            yield


def failing(root: Path) -> AbstractContextManager[object]:
    """EIO: what is written to the file system cannot be put where it lies."""
    return full("../below")(root)


FAULTS: dict[str, tuple[Fault, Fault]] = {
    "results read-only from the start": (read_only("results"), nullcontext),
    "results read-only": (nullcontext, read_only("results")),
    "state read-only": (nullcontext, read_only("state")),
    "results full": (small("results"), full("results")),
    "everything full": (small(""), full("")),
    "a device that fails": (device, failing),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert run_study(objective.study(), root, run=objective.descend, workers=2) == ALL
    return root


def start(root: Path, run: str = "slow", **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.study.run", str(root), "2", run]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)  # type: ignore[call-overload,no-any-return]


def paused(process: subprocess.Popen[str]) -> str:
    """The line of a study that the machine has stopped; nothing has failed, and nothing is a traceback."""
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "failed" not in output
    [line] = [line for line in output.splitlines() if "this machine could not go on" in line]
    return line


@pytest.mark.parametrize("name", FAULTS)
def test_a_study_pauses_with_a_line_and_goes_on_where_it_can(name: str, tmp_path: Path, undisturbed: Path) -> None:
    before, strike = FAULTS[name]
    root = tmp_path / "project"
    root.mkdir()
    with before(root):
        process = start(root)
        if strike is not nullcontext:
            wait_for(lambda: Layout(root, "cheap").done() or process.poll() is not None)
        with strike(root):
            print(paused(process))
        if strike is not nullcontext:
            assert run_study(objective.study(), root, run=objective.descend, workers=2) == ALL
            assert table(root) == table(undisturbed)
    if strike is nullcontext:
        assert run_study(objective.study(), root, run=objective.descend, workers=2) == ALL
        assert table(root) == table(undisturbed)


def test_a_limit_on_the_size_of_files_is_the_machines(tmp_path: Path, undisturbed: Path) -> None:
    limit = 200_000  # less than the database's
    process = start(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    output, _ = process.communicate(timeout=120)
    assert process.returncode in {1, 2}
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if "this machine could not go on" in line]
    assert "disk" in line or "File too large" in line
    assert run_study(objective.study(), tmp_path, run=objective.descend, workers=2) == ALL
    assert table(tmp_path) == table(undisturbed)


@pytest.mark.parametrize(
    "name", ["EROFS", "EIO", "ESTALE", "EACCES", "ENOSPC", "EDQUOT", "EFBIG", "ENOMEM", "ECONNREFUSED"]
)
def test_numbers_that_are_the_machines(name: str) -> None:
    number = getattr(errno, name)
    assert machine_fault(OSError(number, os.strerror(number)))
    assert machine_fault(RuntimeError(f"{os.strerror(number)} (os error {number})"))


def gone(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError as error:
        return error.errno != errno.EBUSY
    return True


@contextmanager
def little_memory(size: int) -> Iterator[Path]:
    """A control group of processes that have so many bytes at most; gives the file that takes their ids."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, kinds, place = line.split(":", 2)
        if "memory" in kinds.split(",") or number == "0":
            legacy = bool(kinds)
            group = Path("/sys/fs/cgroup", "memory" if legacy else "", place.lstrip("/"), "ablate-test")
            limit = group / ("memory.limit_in_bytes" if legacy else "memory.max")
            try:
                group.mkdir()
            except OSError as error:
                pytest.skip(f"a control group cannot be made: {error}")
            try:
                if not limit.exists():
                    pytest.skip("control groups do not limit memory here")
                limit.write_text(str(size))
                yield group / "cgroup.procs"
            finally:
                wait_for(partial(gone, group))  # processes that were killed stay in it for a moment
            return
    pytest.skip("this machine has no control groups")


def test_out_of_memory_takes_a_worker_away_and_then_pauses_but_loses_no_trial(
    tmp_path: Path, undisturbed: Path
) -> None:
    before = oom_kills()
    with little_memory(900 << 20) as members:
        process = start(tmp_path, "greedy", preexec_fn=lambda: members.write_text(str(os.getpid())))
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert oom_kills() == before, "another group's kills are none of this process's"
    assert "was killed by the kernel, for memory ran out" in output
    assert "going on with 1 workers" in output
    assert "out of memory at trial" in output
    assert "died three times" not in output
    assert len(Layout(tmp_path, "cheap").done()) == 7, "all but the one that wants more than there is"
    assert run_study(objective.study(), tmp_path, run=objective.descend, workers=2) == ALL
    assert table(tmp_path) == table(undisturbed)
