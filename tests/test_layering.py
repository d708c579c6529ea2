"""The tree of folders is the architecture: imports point one way, and some rooms know nothing of some libraries."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ablate

PACKAGE = Path(ablate.__file__).parent
# Two modules are on the ground floor, and need no torch: settings, tables and reports name activations (`kernels.spec`),
# and every room names files (`results.layout`).
ORDER = [
    "files", "distributed", "kernels.spec", "results.layout",
    "config", "data", "kernels", "model", "balance", "evaluation", "tasks", "training", "results", "study", "tracking",
    "analysis", "report", "bench", "api", "cli",
]  # fmt: skip
LONG = 400
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and n.level == 0}
    relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    assert not relative, "imports are absolute, so that their direction can be read"
    ours = {
        f"ablate.{a.name}"
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module == "ablate"
        for a in n.names
    }
    return names | modules | ours


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """The room of a module `ablate.…`: one of its own where ORDER names it, else the folder's."""
    parts = name.split(".")[1:]
    return next((inner for inner in (".".join(parts[:2]), parts[0]) if inner in ORDER), parts[0])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upward_only(path: Path) -> None:
    if module(path) in {"ablate", "ablate.__main__"}:
        return
    own = room(module(path))
    assert own in ORDER, f"{own} is not one of the rooms {ORDER}"
    for name in imported(ast.parse(path.read_text())):
        if name.startswith("ablate.") and room(name) in ORDER:
            assert ORDER.index(room(name)) <= ORDER.index(own), f"{path.name} imports {name}, which comes later"


def modules_of(tree: ast.AST) -> list[tuple[str, str]]:
    """Every (module, name) that a file imports from this package, inside functions too; the name may be a module's."""
    return [
        (n.module, a.name)
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module and n.module.split(".")[0] == "ablate"
        for a in n.names
    ]


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {module(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        found = {f"{m}.{n}" if f"{m}.{n}" in names else m for m, n in modules_of(tree)}
        graph[module(path)] = found | (imported(tree) & names) - {"ablate"} if path.name != "__init__.py" else set()
    # What imports nothing that is left is in no circle; a circle is what cannot be taken away.
    while leaves := {name for name, found in graph.items() if not found & graph.keys()}:
        graph = {name: found for name, found in graph.items() if name not in leaves}
    assert not graph, f"a circle of imports among {sorted(graph)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_names_stay_in_their_module(path: Path) -> None:
    tree = ast.parse(path.read_text())
    taken = modules_of(tree)
    private = [f"{m}.{n}" for m, n in taken if any(part.startswith("_") for part in f"{m}.{n}".split("."))]
    names = {module(p) for p in FILES}
    modules = {
        a.asname or a.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom)
        for a in n.names
        if f"{n.module}.{a.name}" in names
    }
    private += [
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in modules
        if n.attr.startswith("_") and not n.attr.startswith("__")
    ]
    assert not private, f"{path.name} uses {private}: what another module needs has no underscore"


@pytest.mark.parametrize(("wing", "others"), [("cpu", ("triton", "ragged")), ("triton", ("cpu", "ragged"))])
def test_wings_of_the_kernels_do_not_know_each_other(wing: str, others: tuple[str, ...]) -> None:
    for path in sorted((PACKAGE / "kernels" / wing).glob("*.py")):
        for name in imported(ast.parse(path.read_text())):
            assert not name.startswith(tuple(f"ablate.kernels.{other}" for other in others)), f"{path.name}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_are_short_or_say_why_not(path: Path) -> None:
    lines = path.read_text().splitlines()
    reason = any(line.startswith(f"# Longer than {LONG} lines because ") for line in lines[:20])
    assert (len(lines) > LONG) == reason, f"{path.name} has {len(lines)} lines; over {LONG}, a comment says why"


@pytest.mark.parametrize(
    ("rooms", "forbidden"),
    [
        (("config", "data", "kernels", "model", "balance", "evaluation", "tasks", "training"), ("mlflow", "optuna")),
        (("analysis", "report"), ("torch", "lightning", "mlflow", "optuna")),
    ],
    ids=["training-knows-no-tracking", "reports-read-tables-only"],
)
def test_rooms_do_not_load(rooms: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    names = [m.name for m in pkgutil.walk_packages(ablate.__path__, "ablate.") if m.name.split(".")[1] in rooms]
    code = f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("ablate.cli.commands, ablate.training.runs", ("torch", "mlflow", "scipy")),
        ("ablate.tasks.registry, ablate.study.runner, ablate.tracking.tracker", ("torch", "lightning", "datasets")),
        ("ablate.evaluation.evaluate, ablate.balance.prune, ablate.training.checkpoint", ("lightning", "statsmodels")),
    ],
    ids=[
        "a-wrong-name-is-told-at-once",
        "who-starts-the-workers-trains-nothing",
        "a-trained-model-is-used-without-lightning",
    ],
)
def test_slow_libraries_wait_until_they_are_needed(modules: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {modules}\nprint([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(ablate.__path__, "ablate.") if not m.name.endswith("__main__")]
)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)
