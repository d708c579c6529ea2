"""Ten thousand trials, as many seeds or as many arms: findings and report in a minute, 2 GB and a page one can send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.measured import ablate
from tests.report.synthetic import write_study

MOST_SECONDS = 60
MOST_BYTES = 2e9
MOST_PAGE = 15e6
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
