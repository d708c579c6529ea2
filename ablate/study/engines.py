"""Where workers run: spawned processes on this machine. An engine starts them, passes on their news, stops them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError

from ablate.config import mask_output, masked
from ablate.files import described, machine_fault
from ablate.study.job import Event, Job
from ablate.study.threads import available_cpus, threads
from ablate.study.worker import work
from ablate.training.lifeline import guarded, out_of_reach


class LocalEngine:
    """One spawned process a worker, threads divided among them; a worker dies with this process."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[str, Any] = {}
        self._pipes: dict[str, Connection] = {}
        self._started = 0

    @property
    def threads(self) -> int:
        """Threads of each worker."""
        return max(1, available_cpus() // self.workers)

    def ensure(self, job: Job, wanted: int) -> None:
        """Start workers until `wanted` of them, at most `workers`, are alive."""
        while len(self._processes) < min(wanted, self.workers):
            slot = self._started % self.workers
            self._started += 1
            receiver, sender = self._context.Pipe(duplex=False)
            log = job.layout.state / "logs" / f"{job.plan.study.name}.worker{slot}.log"
            name = f"{host()}:{os.getpid()}:{self._started}"
            work = pickle.dumps(partial(_main, job, name, slot, log))
            process = self._context.Process(
                target=guarded, args=(os.getpid(), work, sender), name=f"ablate-worker-{slot}"
            )
            with threads(job.threads), out_of_reach():
                process.start()
            sender.close()
            self._processes[name], self._pipes[name] = process, receiver

    def poll(self, seconds: float) -> list[Event]:
        """News of the last moments; waits at most `seconds` for some."""
        if not self._pipes:
            time.sleep(seconds)
            return []
        names = {id(pipe): name for name, pipe in self._pipes.items()}
        events = []
        for pipe in wait(list(self._pipes.values()), timeout=seconds):
            assert isinstance(pipe, Connection)
            try:
                while pipe.poll():
                    events.append(pipe.recv())
            except (EOFError, OSError):
                # The worker is gone, perhaps in the middle of a message; `reap` says how it ended.
                self._pipes.pop(names[id(pipe)]).close()
        return events

    def reap(self) -> list[tuple[str, int]]:
        """Workers that have ended since, with their exit codes (negative: the signal that killed them)."""
        ended = []
        for name, process in list(self._processes.items()):
            if name not in self._pipes or process.exitcode is not None:
                process.join()
                if name in self._pipes:
                    continue  # Its last news are still in the pipe; the next poll reads them.
                ended.append((name, int(process.exitcode or 0)))
                del self._processes[name]
        return ended

    @property
    def alive(self) -> int:
        """Workers that have not been reaped."""
        return len(self._processes)

    def stop(self) -> None:
        """Ask every worker to finish its step, save, and end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End every worker at once; what it was running goes on from its last checkpoint."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.exitcode is None and process.pid:
                os.kill(process.pid, number)


def first_line(error: BaseException) -> str:
    """Return an error's message as one line."""
    return next(iter(str(error).splitlines()), "") or "no message"


def where(error: BaseException) -> str:
    """Return the last place in this package that an error passed through, `study/worker.py:42`."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}ablate{os.sep}" in frame.filename] or frames[-1:]
    return f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}" if ours else "?"


def host() -> str:
    """Return this machine's name, as used in worker names."""
    return os.uname().nodename.replace(":", "_")


def _main(job: Job, name: str, slot: int, log: Path, pipe: Connection) -> None:
    """A worker process from its start to its end."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    _redirect(log)
    mask_output()
    _own_gpu(slot, job.plan.study.trial({}).train.devices)

    def report(event: Event) -> None:
        try:
            pipe.send(event)
        except BrokenPipeError:
            stop.set()

    try:
        work(job, name, report, stop.is_set)
    except StorageInternalError as error:
        report(
            Event(worker=name, kind="lost", message=f"Optuna's database did not answer: {masked(first_line(error))}")
        )
        _end(error)
    except Exception as error:
        # No trial was running: what broke here breaks in every worker, so that the study stops at the first.
        words = f"{where(error)}: {type(error).__name__}: {first_line(error)}"
        if machine_fault(error):
            words = f"this machine could not go on: {described(error)}"
        report(Event(worker=name, kind="fatal", message=masked(words)))
        _end(error)


def _end(error: Exception) -> None:
    """Write a traceback to the worker's log and end it with code 1."""
    print(masked("".join(traceback.format_exception(error))), file=sys.stderr)
    sys.exit(1)


def _redirect(log: Path) -> None:
    """Send what libraries print to a file; the terminal belongs to the study's progress."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _own_gpu(slot: int, devices: int) -> None:
    """Show this worker its own share of the NVIDIA GPUs, before CUDA is initialised."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [p.name[6:] for p in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    if len(gpus) > devices:
        first = slot * devices % len(gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join((gpus + gpus)[first : first + devices])
