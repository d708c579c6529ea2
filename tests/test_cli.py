"""The command as users meet it: every verb explains itself, and bad input is one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ablate import __version__
from ablate.cli.commands import app, run
from ablate.config import ConfigError
from ablate.config.drafts import placed_study

ABLATE = Path(sys.executable).parent / "ablate"
COMMANDS = [[c.name or c.callback.__name__] for c in app.registered_commands if c.callback] + [
    [group.name, command.name or command.callback.__name__]
    for group in app.registered_groups
    if group.typer_instance and group.name
    for command in group.typer_instance.registered_commands
    if command.callback
]


def ablate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ABLATE, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_every_command_has_help_with_an_example() -> None:
    import click
    import typer

    root = typer.main.get_command(app)
    for path in COMMANDS:
        command: click.Command = root  # type: ignore[assignment]
        for name in path:
            command = command.commands[str(name)]  # type: ignore[attr-defined]
        assert "Example: [bold]ablate " + " ".join(map(str, path)) in (command.help or ""), path


@pytest.mark.parametrize(
    ("study", "arguments", "message"),
    [
        (
            None,
            ("study", "run", "studies/x.yaml"),
            "study file 'studies/x.yaml' does not exist; studies beside it: none there",
        ),
        ("", ("study", "run", "studies/x.yaml"), "study file 'studies/x.yaml' is empty: a mapping with name, factors"),
        (
            "factors: {tree.miror: [0, 1]}",
            ("prepare", "studies/x.yaml"),
            "factor 'tree.miror' is unknown: tree has trees, depth,",
        ),
        ("factors: {tree.depth: [3, 99]}", ("study", "run", "studies/x.yaml"), "depth is 99"),
        (
            "base: {corpus: {source: files, path: nowhere}}\nfactors: {tree.mirror: [0, 1]}",
            ("study", "run", "studies/x.yaml"),
            "nowhere",
        ),
        (
            None,
            ("collect", "laptop"),
            "study 'laptop' has no results: run `ablate study run studies/laptop.yaml` first",
        ),
        (None, ("report", "laptop"), "laptop"),
        (None, ("prune", "no-such-run"), "run 'no-such-run' is not known"),
        (None, ("prune", "0123456789ab"), "run '0123456789ab' is not known"),
        (None, ("generate", "no-such-run"), "run 'no-such-run' is not known"),
        (None, ("evaluate", "no-such-run"), "run 'no-such-run' is not known"),
        (None, ("generate", __file__, "--top-k", "0"), "top_k is 0: at least 1 is expected"),
        (None, ("bench", "trial", "--preset", "huge"), "preset is 'huge': one of nano, small is expected"),
        (None, ("kernels", "compile", "--target", "sm_20"), "target is 'sm_20': one of"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    study: str | None, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "studies").mkdir()
    if study is not None:
        (tmp_path / "studies" / "x.yaml").write_text(study)
    done = ablate(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    *waiting, said = done.stderr.splitlines()
    assert said.startswith("ablate: ")
    assert message in said
    assert all(line.endswith(" ...") for line in waiting), "what takes long before the mistake is found is said"
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "results").exists()


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "ablate: Windows is not supported: use WSL 2, which is Linux\n"


def test_version(tmp_path: Path) -> None:
    assert ablate(tmp_path, "--version").stdout == f"ablate {__version__}\n"


def test_a_study_from_elsewhere_is_copied_to_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("factors: {tree.mirror: [0, 1]}\n")
    assert placed_study(tmp_path / "x.yaml", tmp_path).name == "x"
    assert (tmp_path / "studies/x.yaml").read_text() == "factors: {tree.mirror: [0, 1]}\n"
    (tmp_path / "x.yaml").write_text("factors: {tree.mirror: [0, -1]}\n")
    with pytest.raises(ConfigError, match="which has its name: change that one, or rename this"):
        placed_study(tmp_path / "x.yaml", tmp_path)


def test_binary_study_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\x00\xff\x9c")
    done = ablate(tmp_path, "study", "run", "x.yaml")
    assert (done.returncode, done.stderr) == (
        2,
        "ablate: study file 'x.yaml' is not text in UTF-8: byte 0xff at line 1\n",
    )


def test_ctrl_c_that_a_library_took_has_its_line() -> None:
    """Polars answers the signal itself, and typer ends the command with its code and without a word."""
    code = "import sys\nfrom ablate.cli.common import run\nrun(lambda: sys.exit(130))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 130
    assert ended.stderr.splitlines() == [
        "ablate: stopped by SIGINT; what was finished is kept, call the command again and it goes on"
    ]
