"""Ten thousand trials: status at once, tables, findings and report in a minute of CPU and a gigabyte, a page one can send."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.measured import Measured, ablate
from tests.report.synthetic import write_study
from tests.results.grown import NAME, grow

MOST_SECONDS = 60
MOST_BYTES = 2e9
MOST_PAGE = 15e6
VERBS = ("collect", "analyse")
MANY_SEEDS: dict[str, Any] = {"seeds": tuple(range(1250))}
MANY_ARMS: dict[str, Any] = {
    "seeds": (0, 1, 2, 3),
    "factors": {
        "tree.mirror": np.linspace(-1, 1, 25).round(3).tolist(),
        "tree.depth": list(range(2, 12)),
        "tree.leaf_width": list(range(1, 11)),
    },
}


@pytest.mark.soak
@pytest.mark.parametrize("many", [MANY_SEEDS, MANY_ARMS], ids=["8 arms of 1250 seeds", "2500 arms of 4 seeds"])
def test_ten_thousand_trials_in_a_minute_and_two_gigabytes(many: dict[str, Any], tmp_path: Path) -> None:
    write_study(tmp_path, **many, tune=False, controls=False, usage=200)
    done = [ablate(verb, "demo", cwd=tmp_path) for verb in ("analyse", "report")]
    assert max(d.peak for d in done) <= MOST_BYTES
    assert sum(d.seconds for d in done) <= MOST_SECONDS
    page = (tmp_path / "out/demo/index.html").stat().st_size
    print(f"page: {page / 1e6:.1f} MB")
    assert page <= MOST_PAGE


def grown(root: Path, store: Path, seeds: int, *verbs: str) -> dict[str, Measured]:
    """What each command takes on a study of 20 arms and so many seeds, tracked in MLflow."""
    (root / "state").mkdir(parents=True)
    shutil.copyfile(store, root / "state" / "mlflow.db")
    total = grow(root, seeds)
    status = ablate("study", "status", NAME, cwd=root)
    assert f"{total} of {total}" in status.output
    done = {"status": status} | {verb: ablate(verb, NAME, cwd=root) for verb in verbs}
    assert pl.scan_parquet(root / f"tables/{NAME}/trials.parquet").select(pl.len()).collect().item() == total
    return done


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_thousand_results_become_a_report_in_a_minute_and_a_gigabyte(tmp_path: Path, fresh_store: Path) -> None:
    done = grown(tmp_path, fresh_store, 500, "collect", "analyse", "report")
    assert done.pop("status").seconds <= 2
    assert done["collect"].seconds <= 30
    assert sum(d.seconds for d in done.values()) <= MOST_SECONDS
    assert max(d.peak for d in done.values()) <= 1e9
    assert (tmp_path / f"out/{NAME}/index.html").stat().st_size <= MOST_PAGE


@pytest.mark.soak_short
def test_a_thousand_results_become_findings_in_a_tenth_of_that(tmp_path: Path, fresh_store: Path) -> None:
    """Beside what the two commands take for forty trials: imports, which do not grow."""
    least = sum(d.seconds for v, d in grown(tmp_path / "few", fresh_store, 2, *VERBS).items() if v in VERBS)
    done = grown(tmp_path / "many", fresh_store, 50, *VERBS)
    assert sum(done[v].seconds for v in VERBS) - least <= MOST_SECONDS / 10
    assert max(d.peak for d in done.values()) <= 5e8
