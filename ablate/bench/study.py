"""`ablate bench study`: trials an hour of a fixed small study, where a trial's seconds go, and another checkout beside this one."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ablate
from ablate.bench import study_meter
from ablate.config import ConfigError
from ablate.files import write_text

_TOKENS = {"corpus": {"vocab_size": 1024}, "model": {"context": 128, "blocks": 2}}
STUDIES: dict[str, dict[str, Any]] = {
    # Trials of the studies `first`, `confirm` and `capacity`, and few enough of them that two cores end within minutes.
    "first": {
        "base": {**_TOKENS, "train": {"steps": 400, "batch_size": 4, "eval_every": 200, "eval_tokens": 65536}},
    },
    "confirm": {
        "base": {**_TOKENS, "train": {"steps": 600, "batch_size": 8, "eval_every": 100, "eval_tokens": 65536}},
    },
    "facts": {"preset": "facts", "margin": 1.0, "base": {"train": {"lr": 0.005, "eval_every": 1000}}},
}
"""What each study says of its trials; its arms are trees, centred trees and a dense layer of all their units, on two seeds."""
SEEDS = (0, 1)
WARM_STEPS, SHORT_EVALUATION = 4, 8192
LONG = 100_000
"""Steps between checkpoints: none is written, as in the studies themselves."""
THIS, OTHER = "this", "against"
CODE = Path(ablate.__file__).parents[1]


def run(
    name: str,
    *,
    workers: int = 2,
    rounds: int = 1,
    against: Path | None = None,
    steps: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Run the study `rounds` times, with `against` in turn, in a folder that is removed at the end.

    A short one comes first, which compiles kernels and prepares the corpus: both happen once on a machine.

    Rows, one a run: contender, round, trials, seconds (of the whole command), trials_an_hour, core_seconds (of a trial, by part:
    those of `study_meter`, `command` before and after the workers, `idle`), busy (share of the cores' time between the workers'
    start and end that is CPU time), cpu_seconds (of a trial; on a machine that does other work too, they are the fairer measure),
    first_start and later_start (seconds from a trial's claim to its first step).
    Raises ConfigError where `against` is no checkout, or a study does not end.
    """
    places = {THIS: CODE} | ({} if against is None else {OTHER: against.resolve()})
    if against is not None and not (against / "ablate" / "__init__.py").is_file():
        raise ConfigError(f"against is {str(against)!r}: a folder with another checkout of this project is expected")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ablate-bench-") as folder:
        for contender, code in places.items():
            say(f"{contender}: kernels and corpus")
            _run(name, code, Path(folder) / contender / "warm", workers, WARM_STEPS)
        for turn in range(rounds):
            # Who is first in a pair alternates: what the machine does in between falls on both alike.
            for contender, code in sorted(places.items(), reverse=turn % 2 == 0):
                found = _run(name, code, Path(folder) / contender / str(turn), workers, steps)
                rows.append({"contender": contender, "study": name, "round": turn, "workers": workers, **found})
                say(f"{contender}, round {turn + 1}: {found['trials_an_hour']:.0f} trials an hour")
    return rows


def ratios(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Return a number of this checkout over the other's, pair by pair."""
    pairs: dict[int, dict[str, float]] = {}
    for row in rows:
        pairs.setdefault(row["round"], {})[row["contender"]] = row[key]
    return [pair[THIS] / pair[OTHER] for pair in pairs.values() if pair.keys() >= {THIS, OTHER}]


def breakdown(rows: Sequence[dict[str, Any]], contender: str) -> dict[str, float]:
    """Return the median core seconds of a trial by part, over the rounds of a contender."""
    own = [row["core_seconds"] for row in rows if row["contender"] == contender]
    return {part: statistics.median(row[part] for row in own) for part in own[0]}


def settings(name: str, steps: int | None) -> dict[str, Any]:
    """Return the study file of one of `STUDIES`, its trials cut to so many steps and a short evaluation where given."""
    study = copy.deepcopy(STUDIES[name])
    train = study["base"]["train"]
    if steps is not None:
        train.update(steps=steps, eval_every=steps, eval_tokens=SHORT_EVALUATION)
    train["checkpoint_every"] = LONG
    study.update(name="bench", design="one_at_a_time", factors={"tree.routing": ["sign", "centred"]})
    return study | {"controls": ["total"], "seeds": list(SEEDS)}


def _run(name: str, code: Path, folder: Path, workers: int, steps: int | None) -> dict[str, Any]:
    """Run the study once by the package in `code`; return its numbers."""
    parts = folder / "parts"
    parts.mkdir(parents=True)
    data = folder.parent / "data"
    data.mkdir(exist_ok=True)
    (folder / "data").symlink_to(data, target_is_directory=True)
    file = folder / "study.yaml"
    write_text(file, json.dumps(settings(name, steps)))  # JSON is YAML
    command = ["study", "run", str(file), "--workers", str(workers), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(code), study_meter.FOLDER: str(parts)}
    started, clock = time.time(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", str(Path(study_meter.__file__)), *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - clock
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"the study did not end in {str(code)!r}: {last}")
    trials = json.loads(done.stdout.strip().splitlines()[-1])["done"]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(parts.glob("*.json"))]
    return summary(found, trials=trials, workers=workers, started=started, seconds=seconds)


def summary(
    found: Sequence[dict[str, Any]], *, trials: int, workers: int, started: float, seconds: float
) -> dict[str, Any]:
    """Return a run's numbers from what its workers left, their births and ends on the clock of `started`."""
    born, ended = min(f["born"] for f in found), max(f["ended"] for f in found)
    spent = {part: sum(f["parts"][part] for f in found) for part in study_meter.PARTS}
    spent["command"] = workers * (born - started + started + seconds - ended)
    spent["idle"] = max(0.0, workers * seconds - sum(spent.values()))
    later = [start for f in found for start in f["starts"][1:]]
    cpu = sum(f["cpu"] for f in found)
    return {
        "trials": trials,
        "seconds": seconds,
        "trials_an_hour": 3600 * trials / seconds,
        "core_seconds": {part: value / trials for part, value in spent.items()},
        "cpu_seconds": cpu / trials,
        "busy": cpu / (workers * (ended - born)),
        "first_start": statistics.median(f["starts"][0] for f in found if f["starts"]),
        "later_start": statistics.median(later) if later else None,
    }
