"""Compile the CPU kernels before the first trial, so that it is said, done once, and part of no trial's time."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import ablate
from ablate.config import Trial, digest
from ablate.files import write_text
from ablate.training.lifeline import out_of_reach

SOURCES = Path(ablate.__file__).parent / "kernels"
EVERY = 3.0
"""Seconds between two lines."""


def compile_kernels(
    trials: Iterable[Trial], root: Path, say: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
) -> None:
    """Compile what these trials call, where that has not been done on this machine with this code.

    Args:
        trials: what will run.
        root: the project, which notes that it is done where the folder of the kernels cannot.
        say: prints a line.
        stopped: whether to give up; a kernel that is missing is compiled by the trial that needs it.
    """
    if not any(t.model.feedforward == "tree" and t.train.backend == "auto" for t in trials):
        return
    own = SOURCES / "cpu"
    note, key = (own / "__pycache__" if os.access(own, os.W_OK) else root / "state") / "compiled.txt", _key()
    if note.exists() and note.read_text(encoding="utf-8") == key:
        return
    say("looking at the CPU kernels")
    started = said = time.monotonic()
    # By the path that this process imported it from: Numba keeps what it compiled under that path, and another way to
    # the same files, by a link in the working directory, would be compiled for nobody.
    here = [str(SOURCES.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    tied = f"from ablate.training.lifeline import die_with; die_with({os.getpid()})"
    with out_of_reach():
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"{tied}; from ablate.kernels.cpu.warm import main; main()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(here)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        while process.poll() is None and not stopped():
            time.sleep(0.1)
            now = time.monotonic()
            if now - said > EVERY:
                said = now
                say(
                    f"compiling the CPU kernels, once on this machine: {now - started:.0f} s so far, some minutes in all"
                )
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode == 0:
        write_text(note, key)


def _key() -> str:
    """Return the digest of what compiled kernels depend on."""
    code = [path.read_text(encoding="utf-8") for path in sorted((SOURCES / "cpu").glob("*.py"))]
    place = os.environ.get("NUMBA_CACHE_DIR", "")
    return digest([code, version("numba"), sys.version, sys.executable, platform.node(), platform.machine(), place])
