"""The command line in a process of its own, with its time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# A child that subprocess starts shares its parent's memory until it execs, and getrusage's peak remembers that: under a
# large pytest process every command would look as large. VmHWM counts from the exec on; where there is none, getrusage.
_CODE = """
import atexit, pathlib, resource, sys
from ablate.cli import main

def peak():
    try:
        text = pathlib.Path("/proc/self/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

atexit.register(lambda: print(peak(), file=sys.stderr))
main()
"""


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
