"""Whether the kernel ended processes because memory ran out: that is the machine's fault, not the trial's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_GROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of the whole machine since it started, other users' processes included; readable by everybody.
_MACHINE = Path("/proc/vmstat")


def oom_kills() -> int:
    """Return how many processes the kernel has ended so far because memory ran out; 0 where it does not say.

    They are those of this process's control group, in which its workers are; of the whole machine where it has none.
    """
    for counter in _counters():
        try:
            lines = counter.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _counters() -> Iterator[Path]:
    """Yield files that may hold the count, the most specific first: cgroups version 1, version 2, the machine."""
    try:
        groups = [line.split(":", 2) for line in _GROUPS.read_text().splitlines()]
    except OSError:
        groups = []
    for number, kinds, place in groups:
        if "memory" in kinds.split(","):
            yield _MOUNT / "memory" / place.lstrip("/") / "memory.oom_control"
        elif number == "0":
            yield _MOUNT / place.lstrip("/") / "memory.events.local"
    yield _MACHINE
