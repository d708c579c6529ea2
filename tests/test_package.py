"""What `import ablate` offers."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ablate
from ablate.files import PARTIAL, clear_stale, leftovers, replacing, replacing_folder, write_text


def test_public_names_exist_and_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(inspect.getsource(ablate))
    typed = {
        (alias.asname, n.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for n in block.body
        if isinstance(n, ast.ImportFrom)
        for alias in n.names
    }
    assert typed == set(ablate._HOME.items())
    assert {name for name in dir(ablate) if not name.startswith("_")} == set(ablate.__all__)
    assert "__version__" in dir(ablate)
    for name in ablate.__all__:
        assert callable(getattr(ablate, name))


def test_version_is_that_of_the_installed_package() -> None:
    assert ablate.__version__ == importlib.metadata.version("ablate")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_text(tmp_path / "new" / "a.txt", "old")
    with pytest.raises(LookupError), replacing(path) as partial:
        (partial.write_text("half"), [].pop())
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert leftovers(path.parent) == [partial]
    assert path.read_text() == "new"
    assert leftovers(tmp_path / "none") == []


def test_what_a_killed_process_half_wrote_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    names = {n: tmp_path / f".table.csv.{n}{PARTIAL}" for n in (int(dead.stdout), os.getpid(), os.getppid())}
    for path in names.values():
        path.write_text("half")
    (tmp_path / "table.csv").write_text("whole")
    clear_stale(tmp_path)
    assert [n for n, path in names.items() if path.exists()] == [os.getpid(), os.getppid()]
    assert (tmp_path / "table.csv").read_text() == "whole"
    clear_stale(tmp_path / "none")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with replacing_folder(path) as new:
            (new / content).touch()
        assert [p.name for p in path.iterdir()] == [content]
    with pytest.raises(LookupError), replacing_folder(path):
        [].pop()
    assert [p.name for p in path.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [path]
