"""The command line in a process of its own, with its time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

_CODE = (
    "import atexit, resource, sys; from ablate.cli import main; "
    "atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)); main()"
)


class Measured(NamedTuple):
    seconds: float
    """Wall time, with the imports."""
    peak: int
    """Bytes of resident memory at most."""
    output: str


def ablate(*command: str, cwd: Path) -> Measured:
    """Run `ablate *command` in `cwd`; raises CalledProcessError where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *command], cwd=cwd, env=environment, check=True, capture_output=True, text=True
    )
    seconds, peak = time.perf_counter() - started, int(done.stderr.split()[-1]) * 1024
    print(f"{' '.join(command)}: {seconds:.2f} s, {peak / 1e6:.0f} MB")
    return Measured(seconds, peak, done.stdout)
