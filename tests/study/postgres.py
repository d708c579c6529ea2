"""A PostgreSQL server of the test's own, from Debian's binaries, on a free port of loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Its URL for Optuna; skips where there are no binaries."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("no PostgreSQL under /usr/lib/postgresql")
    binaries, data = found[-1].parent, folder / "postgres"
    data.mkdir(mode=0o700)
    user: str | None = None
    if os.geteuid() == 0:  # It refuses to run as root.
        user = "postgres"
        shutil.chown(data, user)
        for parent in data.parents[: len(data.parents) - 2]:
            parent.chmod(parent.stat().st_mode | 0o011)  # So that its user can walk down to its folder.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(*command: str) -> None:
        done = subprocess.run(
            command, user=user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    call(str(binaries / "initdb"), "-D", str(data), "-U", "ablate", "--auth", "trust", "--no-sync")
    settings = f"-h 127.0.0.1 -p {port} -k ''"
    control = [str(binaries / "pg_ctl"), "-D", str(data), "-w"]
    call(*control, "-l", str(data / "log"), "-o", settings, "start")
    try:
        yield f"postgresql://ablate@127.0.0.1:{port}/postgres"
    finally:
        call(*control, "-m", "immediate", "stop")
