"""Whether the kernel ended processes because memory ran out: that is the machine's fault, not the trial's."""

from __future__ import annotations

from pathlib import Path

# Counts kills for want of memory since the machine started, those inside containers included; readable by everybody.
COUNTER = Path("/proc/vmstat")


def oom_kills() -> int:
    """Return how many processes the kernel has ended so far because memory ran out; 0 where it does not say."""
    try:
        lines = COUNTER.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
