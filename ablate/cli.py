"""The `ablate` command: one verb per thing a user does. Imports are inside the commands, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from ablate.config import ConfigError, load_study

app = typer.Typer(
    name="ablate",
    help="Which architectural choices keep tree feed-forward layers balanced, and what each costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
study_app = typer.Typer(help="Plan, run and watch studies.", no_args_is_help=True)
bench_app = typer.Typer(help="Side-by-side speed, as ratios within one run.", no_args_is_help=True)
kernels_app = typer.Typer(help="The GPU kernels, without a GPU.", no_args_is_help=True)
app.add_typer(study_app, name="study")
app.add_typer(bench_app, name="bench")
app.add_typer(kernels_app, name="kernels")

StudyFile = Annotated[Path, typer.Argument(help="A study file, such as studies/laptop.yaml.", show_default=False)]
Name = Annotated[str, typer.Argument(help="A study's name, such as laptop.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with; all cores if not given.")]

ROOT = Path()
"""The project is the current folder: data/, results/, state/, tables/ and reports/ are made in it."""
DATA = Path("data")

C = TypeVar("C", bound=Callable[..., Any])
R = TypeVar("R")


def main() -> NoReturn:
    """Entry point: a ConfigError is one line on stderr and exit code 2."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's and Numba's pools take turns instead of spinning
    try:
        app()
    except ConfigError as error:
        print(f"ablate: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def example(command: str) -> Callable[[C], C]:
    """Add an example to a command's help."""

    def add(function: C) -> C:
        function.__doc__ = f"{function.__doc__}\n\nExample: [bold]ablate {command}[/bold]"
        return function

    return add


@app.command()
@example("prepare studies/laptop.yaml")
def prepare(
    file: StudyFile,
    card: Annotated[Path | None, typer.Option(help="Also write the data card to this file.")] = None,
    force: Annotated[bool, typer.Option(help="Prepare again even where the tokens are there.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a study's corpus into documents, a tokenizer and packed tokens under data/. Does nothing the second time."""
    from ablate.data import tokens

    trial = load_study(file).trial({})
    prepared = _with_progress(lambda report: tokens.prepare(trial.corpus, DATA, force=force, progress=report), quiet=as_json)
    described = tokens.describe(prepared)
    if card is not None:
        _write(card, json.dumps(described, indent=1, sort_keys=True) + "\n")
    if as_json:
        print(json.dumps(described))
    else:
        splits = [[name, *(f"{v:,}" for v in part.values())] for name, part in described["splits"].items()]
        _table("Corpus", ["split", *next(iter(described["splits"].values()))], splits)
        print(f"{described['folder']}  data {described['data_hash']}  licence: {described['licence']}")


@study_app.command("run")
@example("study run studies/laptop.yaml --workers 2")
def study_run(
    file: StudyFile,
    workers: Annotated[int, typer.Option(min=1, help="Local processes; threads are divided among them.")] = 2,
    storage: Annotated[str | None, typer.Option(envvar="OPTUNA_STORAGE", help="Optuna's database URL; SQLite in state/.")] = None,
    tracking: Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's URI; SQLite in state/.")] = None,
    as_json: Json = False,
) -> None:
    """Run every trial of a study that has no result yet. Killed? Call it again: it goes on where it stopped."""
    from ablate.study.runner import run_study
    from ablate.tracking.mlflow import MlflowTracker, default_uri

    study = load_study(file)
    tracker = MlflowTracker(tracking or default_uri(ROOT.resolve()))
    outcome = run_study(study, ROOT, workers=workers, storage=storage, tracker=tracker)
    if as_json:
        print(json.dumps(dataclasses.asdict(outcome)))
    else:
        print(f"{outcome.done} of {outcome.total} trials done. {outcome.message}".rstrip())
    for failure in outcome.failed:
        print(f"ablate: failed: {failure}", file=sys.stderr)
    raise typer.Exit(outcome.exit_code)


@app.command()
@example("collect laptop")
def collect(name: Name) -> None:
    """Export a study's results to tables/NAME/{trials,history,usage}.parquet."""
    from ablate.tracking import export

    print(export.collect(name, ROOT))


@app.command()
@example("analyse laptop")
def analyse(name: Name) -> None:
    """Turn a study's tables into findings: reports/NAME/findings.json."""
    from ablate.analysis import findings

    print(findings.analyse(name, ROOT))


@app.command()
@example("report laptop")
def report(
    name: Name,
    address: Annotated[str | None, typer.Option(envvar="ABLATE_MLFLOW_ADDRESS", help="MLflow's address, for links to runs.")] = None,
) -> None:
    """Write a study's report: reports/NAME/index.html, report.md, figures and tables."""
    from ablate.report import build

    print(build.build(name, ROOT, address))


@bench_app.command("trial")
@example("bench trial --preset nano --json")
def bench_trial(
    preset: Annotated[list[str] | None, typer.Option(help="nano or small; both if not given.")] = None,
    threads: Threads = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each contender.")] = 10,
    as_json: Json = False,
) -> None:
    """Tokens/s of whole training steps: tree, dense, masked tree, and the tree with its usage counted."""
    from ablate.bench import trial

    trial.run(_among(preset or list(trial.BATCH), list(trial.BATCH), "preset"), threads=threads, steps=steps, as_json=as_json)


@kernels_app.command("compile")
@example("kernels compile --target sm_90 --json")
def kernels_compile(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90 or gfx942; all if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Compile every GPU kernel and configuration ahead of time, without a GPU or driver, and print what each needs."""
    from ablate.kernels import compile as compiler

    raise typer.Exit(compiler.run(_among(target or list(compiler.TARGETS), list(compiler.TARGETS), "target"), as_json))


@app.command()
@example("ui")
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow's UI on this project's runs, on 127.0.0.1 only (it has no authentication)."""
    from ablate.tracking.mlflow import serve

    raise typer.Exit(serve(ROOT.resolve(), port))


def _among(values: list[str], allowed: list[str], name: str) -> list[str]:
    for value in values:
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}: one of {', '.join(allowed)} is expected")
    return values


def _with_progress(work: Callable[[Callable[[str, int, int | None], None]], R], *, quiet: bool) -> R:
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


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=any(columns))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
