"""Processes that train get their threads, and threads that wait do not spin where other work needs the cores."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ablate.study.threads import available_cpus, environment, spin_little, threads

ASK = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('GOMP_SPINCOUNT'))"


def asked() -> list[str]:
    """What a process that is started now finds."""
    return subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout.split()


def test_processes_started_inside_find_their_threads_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    with threads(3):
        assert asked() == ["3", "1000"]
    assert asked() == ["None", "None"]


@pytest.mark.parametrize("own", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_how_the_user_lets_threads_wait_stays_as_it_is(own: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    with environment(own):
        with threads(2):
            assert asked() == ["2", own.get("GOMP_SPINCOUNT", "None")]
        spin_little()
        assert os.environ.get("GOMP_SPINCOUNT") == own.get("GOMP_SPINCOUNT")


KEPT = """
import os, resource, torch
def step():
    return [torch.ones(1 << 18) for _ in range(20)]
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults() -> int:
    """Pages that ten steps fault in, in a process that is started now; a step fills 20 MiB."""
    return int(subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_a_worker_keeps_the_memory_of_a_step_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    with threads(1):
        assert faults() < 1000
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    with threads(1):
        assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
        assert faults() > 10_000


def test_the_command_sets_it_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    code = (
        "import os, sys; sys.argv = ['ablate', '--version']\n"
        "from ablate.cli.common import run\n"
        "run(lambda: print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT']))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", "1000"]


def test_a_machine_has_a_core() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
