"""The command line in a process of its own, with its time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
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

def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)

atexit.register(lambda: print(cpu(), peak(), file=sys.stderr))
main()
"""


class Measured(NamedTuple):
    seconds: float
    """CPU time, with the imports and all threads: wall time says more about what else the machine does."""
    peak: int
    """Bytes of resident memory at most."""
    output: str


def ablate(*command: str, cwd: Path) -> Measured:
    """Run `ablate *command` in `cwd`; raises CalledProcessError where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *command], cwd=cwd, env=environment, check=True, capture_output=True, text=True
    )
    used, most = done.stderr.split()[-2:]
    seconds, peak = float(used), int(most) * 1024
    print(f"{' '.join(command)}: {seconds:.2f} s of CPU, {peak / 1e6:.0f} MB")
    return Measured(seconds, peak, done.stdout)
