"""Write the reference pages of the documentation from the package's docstrings, read as text: nothing is imported."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ablate"

Documented = ast.FunctionDef | ast.ClassDef


def write(folder: Path) -> None:
    """Write one page a room of the package, and an index, into `folder`; pages that are already right are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rooms = sorted(p for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists())
    rooms = [room for room in rooms if not room.name.startswith("_")]
    pages = {f"{room.stem}.md": _room(room) for room in rooms}
    names = "\n".join(room.stem for room in rooms)
    pages["index.md"] = (
        "# API reference\n\nWritten from the docstrings, one page a room. Names with a leading underscore are left out.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
    )
    for old in set(folder.glob("*.md")) - {folder / name for name in pages}:
        old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _room(room: Path) -> str:
    files = [room] if room.suffix else sorted(room.rglob("*.py"))
    modules = [(file, ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    title = f"# ablate.{room.stem}\n\n"
    return title + "\n".join(_module(file, tree) for file, tree in modules if ast.get_docstring(tree))


def _module(file: Path, tree: ast.Module) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    out = [f"## {name}\n", f"```{{py:module}} {name}\n```\n", _text(tree)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            out.append(_entry(node, "function" if isinstance(node, ast.FunctionDef) else "class", 3))
    return "\n".join(out)


def _entry(node: Documented, kind: str, depth: int) -> str:
    fence = "`" * (3 + depth)
    out = [f"{fence}{{py:{kind}}} {node.name}{_signature(node)}\n:single-line-parameter-list:\n", _text(node)]
    if isinstance(node, ast.ClassDef):
        for item, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                words = {ast.unparse(d) for d in item.decorator_list}
                out.append(_entry(item, "property" if words & {"property", "cached_property"} else "method", 1))
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                out.append(_attribute(item, following))
    return "\n".join([*out, fence, ""])


def _attribute(item: ast.AnnAssign, following: ast.stmt | None) -> str:
    assert isinstance(item.target, ast.Name)
    value = f"\n:value: {ast.unparse(item.value)}" if item.value else ""
    head = f"`````{{py:attribute}} {item.target.id}\n:type: {ast.unparse(item.annotation)}{value}\n"
    text = ""
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        text = markdown(inspect.cleandoc(str(following.value.value)))
    return f"{head}\n{text}\n`````\n"


def _signature(node: Documented) -> str:
    if isinstance(node, ast.ClassDef):
        made = [i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"]
        return f"({_arguments(made[0].args)})" if made else ""
    if any(ast.unparse(d) in {"property", "cached_property"} for d in node.decorator_list):
        return ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({_arguments(node.args)}){returns}"


def _arguments(args: ast.arguments) -> str:
    text = ast.unparse(args)
    return text.removeprefix("self, ").removeprefix("self").removeprefix("cls, ").removeprefix("cls")


def _text(node: ast.Module | Documented) -> str:
    return markdown(ast.get_docstring(node) or "") + "\n"


def markdown(text: str) -> str:
    """Return a docstring as Markdown: examples as code, `Args:` and the like as lists, any other sign as it is written."""
    out: list[str] = []
    example = False
    for line in text.splitlines():
        if example and not line.strip():
            out.append("```")
            example = False
        elif line.lstrip().startswith(">>>") and not example:
            out.append("```python")
            example = True
        if example:
            out.append(line.strip() if line.lstrip().startswith((">>>", "...")) else line)
            continue
        parts = line.strip().split("`")
        parts[::2] = ["".join(f"\\{sign}" if sign in "*<[$" else sign for sign in part) for part in parts[::2]]
        depth = len(line) - len(line.lstrip())
        named = depth == 4 and ":" in line and line.strip()[0] not in "-*"
        out.append(("- " if named else "  " if depth else "") + "`".join(parts))
    return "\n".join([*out, "```"] if example else out)
