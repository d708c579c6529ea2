"""The repository stays small: outputs are drawn, not kept, and the pictures that pages show are in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git, or not a checkout: which files are tracked is not known")
    files = [Path(name) for name in listed.decode().split("\0") if name]
    return [path for path in files if (ROOT / path).is_file()]


def test_a_working_tree_is_small(tracked: list[Path]) -> None:
    written = [path for path in tracked if path.parts[0] in {"ablate", "tests"}]  # code grows with what it does
    assert len(tracked) - len(written) < 300
    assert sum(path.parts[0] == "reports" for path in tracked) < 300
    assert sum((ROOT / path).stat().st_size for path in tracked) < 30e6


def test_what_is_drawn_is_not_tracked(tracked: list[Path]) -> None:
    drawn = [p for p in tracked if p.parts[0] == "reports" and {"tables", "plots"} & {*p.parts}]
    assert drawn == []


def test_pages_show_pictures_that_are_tracked(tracked: list[Path]) -> None:
    pages = [p for p in tracked if p.suffix == ".md" and p.parts[0] in {"README.md", "reports", "docs"}]
    assert Path("reports/confirm/report.md") in pages
    for page in pages:
        shown = re.findall(r"!\[[^\]]*\]\((?!https?:)([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
        missing = [name for name in shown if page.parent / name not in tracked]
        assert not missing, f"{page} shows {missing[0]}, which git does not have"
