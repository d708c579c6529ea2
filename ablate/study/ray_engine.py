"""Workers as Ray core tasks, on one machine or many: Ray places and restarts them, the storage coordinates them.

Not Ray Tune: its Optuna search drops Optuna's pruners. All nodes need the project's folder (a shared file system), a
PostgreSQL storage and an MLflow server over HTTP; see docs/cluster.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ablate.config import ConfigError
from ablate.study.engines import host
from ablate.study.job import Event, Job
from ablate.study.threads import spin_little
from ablate.study.worker import work

LOOK_SECONDS = 1.0


class _Mailbox:
    """News from workers to the driver, and the driver's wish to stop to them; lives on the driver's node."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False

    def put(self, event: Event) -> bool:
        self._events.append(event)
        return self._stopping

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping


class RayEngine:
    """Runs `workers` tasks; see runner.Engine for what each method promises.

    Args:
        workers: tasks at once; Ray lets those wait for which the cluster has no room.
        address: of a running cluster (`auto`, `host:port` or `ray://…`); a cluster of this machine where not given.
        cpus_per_trial: cores, and threads, of each worker.
        gpus_per_trial: GPUs of each worker; 0.5 lets two share one.

    Raises:
        ConfigError: no cluster answers at the address.
    """

    def __init__(
        self, workers: int, address: str | None = None, *, cpus_per_trial: int = 1, gpus_per_trial: float = 0.0
    ) -> None:
        self.workers = workers
        self._cpus, self._gpus = cpus_per_trial, gpus_per_trial
        if not ray.is_initialized():
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RayError, ValueError) as error:
                raise ConfigError(f"address is {address!r}: no Ray cluster answers there ({error})") from None
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox: Any = ray.remote(num_cpus=0)(_Mailbox).options(scheduling_strategy=here).remote()
        self._tasks: dict[str, Any] = {}
        self._started = 0

    @property
    def threads(self) -> int:
        """Threads of each worker."""
        return self._cpus

    @property
    def alive(self) -> int:
        """Tasks that have not been reaped."""
        return len(self._tasks)

    def ensure(self, job: Job, wanted: int) -> None:
        """Submit tasks until `wanted` of them, at most `workers`, are there."""
        nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
        machines = {node["NodeManagerHostname"] for node in nodes() if node["Alive"]}
        if len(machines) > 1 and job.storage.startswith("sqlite"):
            raise ConfigError(f"storage is {job.storage!r}: {len(machines)} machines need PostgreSQL, postgresql://…")
        task = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0, max_calls=1)(_task)
        while len(self._tasks) < min(wanted, self.workers):
            self._started += 1
            name = f"{host()}:ray:{id(self)}:{self._started}"
            self._tasks[name] = task.remote(job, name, self._mailbox)

    def poll(self, seconds: float) -> list[Event]:
        """News of the last moments."""
        time.sleep(seconds)
        events: list[Event] = ray.get(self._mailbox.drain.remote())
        return events

    def reap(self) -> list[tuple[str, int]]:
        """Tasks that have ended, with 0, or 1 where the task, its process or its node died."""
        ended = []
        for name, task in list(self._tasks.items()):
            ready, _ = ray.wait([task], timeout=0)
            if not ready:
                continue
            try:
                ray.get(task)
                ended.append((name, 0))
            except RayError:
                ended.append((name, 1))
            del self._tasks[name]
        return ended

    def stop(self) -> None:
        """Ask every worker to finish its step, save, and end."""
        ray.get(self._mailbox.stop.remote())

    def kill(self) -> None:
        """End every worker at once."""
        for task in self._tasks.values():
            ray.cancel(task, force=True)


def _task(job: Job, name: str, mailbox: Any) -> None:
    """Ask the worker to stop, through the mailbox."""
    spin_little()
    stop, done = threading.Event(), threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            try:
                if ray.get(mailbox.stopping.remote()):
                    stop.set()
            except RayError:
                stop.set()  # The driver is gone.

    def report(event: Event) -> None:
        mailbox.put.remote(event)

    watcher = threading.Thread(target=look, daemon=True, name="stop-watch")
    watcher.start()
    try:
        work(job, name, report, stop.is_set)
    finally:
        done.set()
