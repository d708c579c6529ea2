"""Everything that studies do works on every task: designs, interruption, tables, findings, report, publishing, reproduction."""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from mlflow.tracking import MlflowClient
from polars.testing import assert_frame_equal

from ablate.analysis.findings import analyse
from ablate.analysis.frames import canonical
from ablate.config import Study, load_study
from ablate.config.endpoints import TASK_ENDPOINTS
from ablate.report.build import build
from ablate.report.published import publish, redraw
from ablate.results.collect import collect
from ablate.results.kept import table as published_table
from ablate.results.layout import TRIALS
from ablate.study.engines import LocalEngine
from ablate.study.job import Event, Job
from ablate.study.outcome import Outcome
from ablate.study.runner import run_study
from ablate.study.worker import work
from ablate.tracking.reproduce import reproduce
from ablate.tracking.store import default_uri
from ablate.tracking.tracker import MlflowTracker

DRAWN = [kind for kind in TASK_ENDPOINTS if kind != "language"]
BASE: dict[str, Any] = {
    "model": {"d_model": 16, "heads": 1, "blocks": 1},
    "tree": {"trees": 2, "depth": 2, "leaf_width": 1},
    "train": {"steps": 12, "batch_size": 32, "eval_every": 6, "eval_tokens": 512, "checkpoint_every": 4},
}
DESIGNS: dict[str, dict[str, Any]] = {
    "factorial": {"design": "factorial", "factors": {"tree.mirror": [0, 1]}, "seeds": [0, 1]},
    "confirm": {
        "design": "confirm",
        "arms": {"even": {"tree.mirror": 1}, "hash": {"tree.router": "hash"}},
        "contrasts": [{"arm": "even", "claim": "matches", "margin": 1}],
        "controls": ["total", "active", "moe"],
        "seeds": [0, 1],
    },
    "search": {
        "design": "search",
        "factors": {"tree.mirror": [0, 0.5, 1], "tree.routing": ["sign", "centred"]},
        "budget": {"trials": 6},
        "seeds": [0, 1],
    },
}


class Here:
    """A worker as a thread of this process, which starts in no time; its first one is asked to stop after some steps."""

    workers = threads = 1

    def __init__(self, stop_after: int = 0) -> None:
        self._left, self._events = stop_after, queue.SimpleQueue[Event]()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.stops = 0

    def ensure(self, job: Job, wanted: int) -> None:
        if self._thread is None and wanted:
            self._stop.clear()
            self._thread = threading.Thread(target=work, args=(job, "here", self._events.put, self._stopped))
            self._thread.start()

    def _stopped(self) -> bool:
        if self._left:
            self._left -= 1
            if not self._left:
                self.stops += 1
                self._stop.set()
        return self._stop.is_set()

    def poll(self, seconds: float) -> list[Event]:
        if self._thread is not None:
            self._thread.join(seconds)
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def reap(self) -> list[tuple[str, int]]:
        if self._thread is None or self._thread.is_alive():
            return []
        self._thread = None
        return [("here", 0)]

    @property
    def alive(self) -> int:
        return int(self._thread is not None)

    def stop(self) -> None:
        self._stop.set()

    kill = stop


def written(root: Path, kind: str, design: str) -> Study:
    """A tiny study of a task, as a file of a project."""
    task = {"kind": kind} | ({"facts": 100, "classes": 8} if kind == "facts" else {})
    content = {
        "title": f"{kind} {design}",
        "preset": kind,
        "margin": 0.01,
        "base": {"task": task, **BASE},
        **DESIGNS[design],
    }
    path = root / "studies" / f"{design}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_study(path)


def table(root: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(collect(name, root) / "trials.parquet").drop("run_id", "seconds", "tokens_per_second")


@pytest.mark.parametrize("kind", ["facts", *(pytest.param(k, marks=pytest.mark.soak) for k in DRAWN if k != "facts")])
def test_a_study_of_a_task_runs_from_file_to_published_report(kind: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    study, quality = written(whole, kind, "factorial"), TASK_ENDPOINTS[kind][0].name
    tracker = MlflowTracker(default_uri(whole))
    assert run_study(study, whole, engine=Here(), tracker=tracker) == Outcome(4, 4)

    written(parts, kind, "factorial")
    engine = Here(stop_after=6)
    assert run_study(study, parts, engine=engine) == Outcome(4, 4)
    assert engine.stops == 1
    first = table(whole, "factorial")
    assert_frame_equal(first, table(parts, "factorial"))
    assert first[quality].null_count() == first[f"{quality}_start"].null_count() == 0
    assert first["bpb"].null_count() == 4

    found = json.loads(analyse("factorial", whole).read_text())
    assert {f["endpoint"] for f in found["findings"]} >= {quality, "n_eff_frac"}
    assert found["summary"][f"best_{quality}"] is not None
    text = (build("factorial", whole) / "report.md").read_text(encoding="utf-8")
    assert "bits per byte" not in text
    assert study.quality.label in text
    kept = publish("factorial", whole)
    assert redraw("factorial", whole) == []

    run = pl.read_parquet(published_table(kept, TRIALS))["run_id"][0]
    logged = MlflowClient(default_uri(whole)).get_run(run)
    assert logged.data.metrics.keys() >= {quality, "n_eff_frac"}
    again = reproduce(run, whole)
    assert (again.endpoint, sorted(again.before)) == (quality, [0, 6, 12])
    assert again.equal, again


@pytest.mark.soak
@pytest.mark.parametrize("design", ["confirm", "search"])
@pytest.mark.parametrize("kind", DRAWN)
def test_every_design_runs_on_every_task(kind: str, design: str, tmp_path: Path) -> None:
    study = written(tmp_path, kind, design)
    outcome = run_study(study, tmp_path, engine=LocalEngine(2), tracker=MlflowTracker(default_uri(tmp_path)))
    assert outcome.exit_code == 0, outcome
    assert outcome.done == outcome.total
    assert set(table(tmp_path, design)["status"]) == {"finished"}
    found = json.loads(analyse(design, tmp_path).read_text())
    if design == "confirm":
        assert not found["assay"]["sensitive"]
        against = [f for f in found["findings"] if f["reference"].startswith(("dense_total", "dense_active"))]
        assert {f["verdict"] for f in against} == {"inconclusive"}
        assert all("cannot tell" in f["reasons"][0] for f in against)
        assert "The gate: " in (build(design, tmp_path) / "report.md").read_text(encoding="utf-8")
    else:
        assert found["search"]["candidates"]
        build(design, tmp_path)
    assert canonical(found) == analyse(design, tmp_path).read_text(encoding="utf-8")
