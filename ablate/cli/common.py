"""What the commands share: the typer apps, argument types, and how tables, progress and errors look."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

import ablate
from ablate.cli.early import GOES_ON
from ablate.config import NAME, ConfigError, echo, load_study, mask_output, masked, one_line
from ablate.files import described, machine_fault
from ablate.study.stopping import Stopped, stopping
from ablate.study.threads import spin_little
from ablate.training.lifeline import COLLECT_AFTER, kill_descendants

app = typer.Typer(
    name="ablate",
    help="Which architectural choices keep tree feed-forward layers balanced, and what each costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
study_app = typer.Typer(help="Plan, run and watch studies.", no_args_is_help=True)
bench_app = typer.Typer(help="Side-by-side speed, as ratios within one run.", no_args_is_help=True)
kernels_app = typer.Typer(help="The GPU kernels, without a GPU.", no_args_is_help=True)
app.add_typer(study_app, name="study")
app.add_typer(bench_app, name="bench")
app.add_typer(kernels_app, name="kernels")

StudyFile = Annotated[Path, typer.Argument(help="A study file, such as studies/first.yaml.", show_default=False)]
Name = Annotated[
    str,
    typer.Argument(help="A study's name, such as first.", show_default=False, callback=lambda name: study_name(name)),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Run = Annotated[str, typer.Argument(help="A trial's hash, an MLflow run's id, or a weights file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another setting: train.steps=50, or seeds=[0,1]. Repeat it.", show_default=False),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with; all cores if not given.")]

ROOT = Path()
"""The project is the current folder: data/, results/, state/, tables/ and out/ are made in it."""
DATA = Path("data")

C = TypeVar("C", bound=Callable[..., Any])
R = TypeVar("R")


def _version(shown: bool) -> None:
    if shown:
        print(f"ablate {ablate.__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run(work: Callable[[], object] = app) -> NoReturn:
    """Run what was asked for: what a user can mend is one line on stderr and exit code 2, the machine's faults exit code 1.

    SIGINT and SIGTERM end every command in seconds, with one line and exit code 128 + their number.
    """
    if sys.platform == "win32":
        print("ablate: Windows is not supported: use WSL 2, which is Linux", file=sys.stderr)
        sys.exit(2)
    gc.set_threshold(COLLECT_AFTER)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    spin_little()
    mask_output()
    code, stopped = 0, False
    try:
        with stopping() as stops:
            work()
    except ConfigError as error:
        code = _say(str(error), 2)
    except Stopped as stop:
        code = _say(f"{stop}; {GOES_ON}", 128 + stop.number)
        stopped = True
    except BrokenPipeError:  # `| head` has seen enough
        code = _silent(141)
    except (OSError, MemoryError) as error:
        if not machine_fault(error):
            raise
        code = _say(f"this machine could not go on: {described(error)}", 1)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        # A library (polars) took the signal, and typer its error.
        if code == 128 + signal.SIGINT and stops.received is None:
            _say(f"stopped by SIGINT; {GOES_ON}", code)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _silent(141)
    except OSError as error:
        code = _silent(_say(f"the output could not be written: {described(error)}", 1))
    if stopped:  # Python would wait for threads and take modules apart, which lasts seconds.
        kill_descendants()  # one that was being started when the signal came is known to nobody
        atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)


def _say(message: str, code: int) -> int:
    """Print a message as one line; returns the exit code."""
    print(f"ablate: {one_line(masked(message))}", file=sys.stderr)
    return code


def _silent(code: int) -> int:
    """Drop what cannot be written to stdout, or Python would complain about it at its end; returns the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def example(command: str) -> Callable[[C], C]:
    """Add an example to a command's help."""

    def add(function: C) -> C:
        function.__doc__ = f"{function.__doc__}\n\nExample: [bold]ablate {command}[/bold]"
        return function

    return add


def among(values: list[str], allowed: list[str], name: str) -> list[str]:
    """The values, or a ConfigError for the first that is not allowed."""
    for value in values:
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}: one of {', '.join(allowed)} is expected")
    return values


def with_progress(work: Callable[[Callable[[str, int, int | None], None]], R], *, quiet: bool) -> R:
    """Run `work` with a callback (stage, bytes done, bytes in all) that draws a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        return work(report)


def study_name(name: str) -> str:
    """Return a study's name as typed; raises ConfigError for a file, and for what would lead out of results/."""
    stem = Path(name).stem
    if Path(name).suffix in {".yaml", ".yml"} and NAME.fullmatch(stem):
        raise ConfigError(f"{echo(name)} is a file: a study's name is expected: {stem}")
    if not NAME.fullmatch(name):
        raise ConfigError(f"{echo(name)} is no study's name: letters, digits, '.', '_' and '-' are allowed")
    return name


def number(text: str) -> int:
    """Return a number of shots as typed."""
    if not (text.isdecimal() and len(text) < 10):
        raise ConfigError(f"shots is {text!r}: a number from 0 up is expected")
    return int(text)


def corpus_in(file: Path) -> Any:
    """The prepared corpus of a study file; raises ConfigError for one of a task that reads no text."""
    from ablate.data import tokens

    trial = load_study(file).trial({})
    if trial.task.kind != "language":
        raise ConfigError(f"study file {str(file)!r} is of task {trial.task.kind!r}: it has no corpus")
    return tokens.prepare(trial.corpus, DATA)


def show(drawing: Any) -> None:
    """Print something rich can draw."""
    from rich.console import Console

    Console().print(drawing)


def table_of(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; without a header where all columns are nameless."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As Text: in a plain string rich reads [x] as markup.
    table = Table(title=Text(title, "table.title"), show_header=any(columns))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    Console().print(table)
