"""Every command that a page, a report or a message prints is one that exists, with options that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ablate.cli.commands import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("reports/**/*.md")}
    - {ROOT / "CHANGELOG.md"}  # it tells of options by their names
)
SOURCES = sorted([*ROOT.glob("ablate/**/*.py"), *ROOT.glob("ablate/**/*.j2"), ROOT / "Makefile", ROOT / "dvc.yaml"])


def commands(text: str, program: str) -> Iterator[list[str]]:
    """Yield the arguments of every call of a program in a page: in blocks of code, between backticks, in tables."""
    found = re.findall(rf"`({program} [^`\n]+)`", text)
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        found += block.replace("\\\n", " ").splitlines()
    found += [line.strip() for line in text.splitlines() if line.startswith(f"    {program} ")]
    found += re.findall(rf"\| ({program} [^|;]+) \|", text)
    for line in found:
        words = shlex.split(re.sub(r"\{[^{}]*\}|<[^<>]*>", "1", line), comments=True)
        for part in _split(words):
            if part[:1] == [program] and part[1:] not in ([], ["…"]):
                yield part[1:]


def _split(words: list[str]) -> Iterator[list[str]]:
    """Yield the commands of a line."""
    part: list[str] = []
    for word in [*words, "&&"]:
        if word in {"&&", "||", "&", ";", "|"}:
            yield part
            part = []
        else:
            part.append(word)


def check(arguments: list[str], *accepted: str) -> None:
    """Parse a command as the shell would hand it over, and run nothing; `accepted` names errors that are none."""
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if not rest or any("completion" in word for word in rest):
        return  # a page names the command, and does not call it; completion would be installed here
    try:
        command.make_context(arguments[0], rest)
    except (Exception, SystemExit) as error:
        if type(error).__name__ not in {"Exit", *accepted}:  # Exit: --help
            raise AssertionError(f"ablate {shlex.join(arguments)}: {error}") from None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_of_a_page_can_be_pasted(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for known in {tuple(arguments) for arguments in commands(text, "ablate")}:
        check([*known])
    dvc = importlib.import_module("dvc.cli")  # it has no types
    for arguments in commands(text, "dvc"):
        assert dvc.parse_args(arguments).func


def test_the_commands_of_messages_can_be_pasted() -> None:
    found = [a for path in SOURCES for a in commands(path.read_text(encoding="utf-8"), "ablate")]
    assert len(found) > 30
    for arguments in found:
        check(arguments, "MissingParameter")  # a docstring names a command with an option
