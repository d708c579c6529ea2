"""A real MLflow server on loopback, which can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ablate.tracking.pages import JOBS
from ablate.tracking.store import default_uri


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """Serves the database under `root`/state at `uri`."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", default_uri(self.root)]
        command += ["--artifacts-destination", str(self.root / "state" / "served"), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        log = (self.root / "server.log").open("ab")
        # Its job workers, eight processes, serve prompts and traces, which are not used here.
        environment = {**os.environ, JOBS: "false"}
        self.process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, env=environment)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError((self.root / "server.log").read_text())

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
