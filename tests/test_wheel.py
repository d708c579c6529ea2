"""The wheel alone serves the whole path: a new study, its run, findings and report, from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content; what the package needs is that of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    source = folder / "source"
    source.mkdir()
    for name in ("ablate", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "site")
    return folder / "site"


@pytest.mark.soak
def test_from_an_empty_folder_to_a_report(installed: Path, tmp_path: Path) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    start = f"#!/bin/sh\nexec {sys.executable} -c 'from ablate.cli import main; main()' \"$@\"\n"
    (bin / "ablate").write_text(start)
    (bin / "ablate").chmod(0o755)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / ".ci/path"], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 trials done" in done.stdout
