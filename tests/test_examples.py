"""The examples run as their README says, from the project's folder, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWS = {
    "layer.py": ["routing centred, after training:", "of the leaves in effective use"],
    "convert.py": ["n_eff_frac", "largest difference of the logits after saving and loading: 0"],
    "own_study.py": ["n_eff_frac", "mirror=1", "rows of balance", "balance.png"],
}


def test_every_example_is_run_and_listed() -> None:
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == set(SHOWS)
    listed = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in listed for name in SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_an_example_shows_what_it_is_for(name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, f"examples/{name}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    missing = [text for text in SHOWS[name] if text not in done.stdout]
    assert not missing, done.stdout
