"""`ablate bench tasks` times whole trials of every task that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablate.bench.tasks import SIZES, run
from ablate.tasks.registry import tasks


def test_every_task_has_a_size() -> None:
    assert set(SIZES) == set(tasks())


@pytest.mark.parametrize("kind", [kind for kind in SIZES if kind != "language"])
def test_a_trial_of_a_task_is_timed_with_its_evaluations(kind: str, tmp_path: Path) -> None:
    rows = run([kind], tmp_path, steps=3)
    assert [row["contender"] for row in rows] == ["tree", "dense_total"]
    for row in rows:
        assert (row["steps"], row["evaluations"], row["threads"]) == (3, 2, 1)
        assert 0 < row["training"] < row["seconds"]
        assert row["trials_an_hour"] == 3600 / row["seconds"]
