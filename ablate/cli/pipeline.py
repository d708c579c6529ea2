"""Verbs of the pipeline: prepare, study, collect, analyse, report, and looking after runs."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ablate.cli.common import (
    DATA,
    ROOT,
    Json,
    Name,
    StudyFile,
    among,
    app,
    example,
    table_of,
    with_progress,
)
from ablate.cli.waiting import Steps, busy, say
from ablate.config import ConfigError, Trial, load_study, masked
from ablate.files import write_text
from ablate.training.lifeline import out_of_reach, processes


@app.command()
@example("prepare studies/first.yaml")
def prepare(
    file: StudyFile,
    card: Annotated[Path | None, typer.Option(help="Also write the data card to this file.")] = None,
    force: Annotated[bool, typer.Option(help="Prepare again even where the tokens are there.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a study's corpus into documents, a tokenizer and packed tokens under data/. Does nothing the second time."""
    from ablate.data import tokens

    trial = load_study(file).trial({})
    if trial.task.kind != "language":
        _drawn(trial, card, as_json=as_json)
        return
    prepared = with_progress(
        lambda report: tokens.prepare(trial.corpus, DATA, force=force, progress=report), quiet=as_json
    )
    described = tokens.describe(prepared)
    if card is not None:
        write_text(card, json.dumps(described, indent=1, sort_keys=True) + "\n")
    if as_json:
        print(json.dumps(described))
    else:
        splits = [[name, *(f"{v:,}" for v in part.values())] for name, part in described["splits"].items()]
        table_of("Corpus", ["split", *next(iter(described["splits"].values()))], splits)
        print(f"{described['folder']}  data {described['data_hash']}  licence: {described['licence']}")


def _drawn(trial: Trial, card: Path | None, *, as_json: bool) -> None:
    """Say that a task's data needs no preparation, and write its card."""
    from ablate.tasks.registry import open_task

    described = open_task(trial, DATA).card
    if card is not None:
        write_text(card, json.dumps(described, indent=1, sort_keys=True) + "\n")
    print(
        json.dumps(described) if as_json else f"Task {trial.task.kind!r} draws its data from seeds: nothing to prepare."
    )


@app.command()
@example("collect first")
def collect(name: Name) -> None:
    """Export a study's results to tables/NAME/{trials,history,usage,trees,prune}.parquet."""
    with busy(f"collecting the results of {name}"):
        from ablate.results import collect as tables

        print(tables.collect(name, ROOT))


@app.command()
@example("analyse first")
def analyse(name: Name) -> None:
    """Turn a study's tables into findings: out/NAME/findings.json, also logged to the study's MLflow run."""
    with busy(f"analysing {name}"):
        from ablate.analysis import findings

        print(findings.analyse(name, ROOT))
    _log(name, ["findings.json", "metrics.json"])


@app.command()
@example("report first")
def report(
    name: Name,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="ABLATE_MLFLOW_ADDRESS", help="MLflow's address, for links to runs; a server's is known by itself."
        ),
    ] = None,
) -> None:
    """Write a study's report: out/NAME/index.html, report.md, figures and tables; logged to the study's MLflow run."""
    with busy(f"drawing the report of {name}"):
        from ablate.report import build

        server = os.environ.get("MLFLOW_TRACKING_URI", "")
        print(build.build(name, ROOT, address or (server if server.startswith("http") else None)))
    _log(name, ["findings.json", "metrics.json", "index.html", "report.md", "figures"])


def _log(name: str, files: list[str]) -> None:
    """Log what was written to MLflow; the files on disk do not depend on it."""
    try:
        with busy("logging to MLflow"):
            from ablate.tracking.log_report import log_report

            log_report(name, ROOT, files, tracking=os.environ.get("MLFLOW_TRACKING_URI"))
    except ConfigError as error:
        print(f"ablate: not logged to MLflow: {error}", file=sys.stderr)


@app.command()
@example("publish first")
def publish(name: Name) -> None:
    """Pack a study's tables into reports/NAME/data.zip, from which `ablate figures` draws its report."""
    with busy(f"publishing {name}"):
        from ablate.report import published

        print(published.publish(name, ROOT))


@app.command()
@example("figures")
def figures(
    names: Annotated[
        list[str] | None, typer.Argument(help="Published studies; all if not given.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the reports of published studies from their kept tables; exit code 1 where any of their data differ."""
    from ablate.report import published
    from ablate.study.threads import threads

    known = published.published(ROOT)
    chosen = list(dict.fromkeys(among(names, known, "published study"))) if names else known
    if not chosen:
        raise ConfigError("no study is published in 'reports': `ablate publish NAME` does it")
    slowest_first = sorted(chosen, key=lambda name: -published.size(name, ROOT))
    workers = min(len(chosen), os.cpu_count() or 1)
    drawing = busy(f"drawing {len(chosen)} reports", quiet=as_json)
    try:
        with drawing, processes(workers, _drawing) as pool:
            with threads(1), out_of_reach():
                drawn = pool.map(published.redraw, slowest_first, [ROOT] * len(slowest_first))
            redrawn = list(drawn)
    finally:
        published.clear(ROOT)
    found = dict(sorted(zip(slowest_first, redrawn, strict=True)))
    if as_json:
        print(json.dumps(found))
    else:
        for name, changed in found.items():
            print(f"{name}: {'differs: ' + ', '.join(changed) if changed else 'the same data'}")
    raise typer.Exit(1 if any(found.values()) else 0)


def _drawing() -> None:
    """Begin a process that draws."""
    # Matplotlib makes small objects by the million; looking for dead ones less often saves a tenth of the time.
    gc.set_threshold(200_000)


@app.command()
@example("ui")
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow's UI on this project's runs, on 127.0.0.1 only (it has no authentication)."""
    from ablate.tracking.pages import check_port, serve
    from ablate.tracking.store import default_uri, prepare_store

    uri = os.environ.get("MLFLOW_TRACKING_URI") or default_uri(ROOT.resolve())
    if uri.startswith("http"):
        print(f"MLflow runs at {masked(uri)}")
        return
    check_port(port)
    with busy("opening MLflow's database"):
        studies = [e for e in prepare_store(uri).search_experiments(order_by=["name"]) if e.name != "Default"]
    say("starting MLflow ...")
    raise typer.Exit(serve(uri, studies, port))


@app.command()
@example("doctor --fix")
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired.")] = False,
    as_json: Json = False,
) -> None:
    """Compare Optuna's trials, MLflow's runs, checkpoints and DVC's outputs; exit code 1 while something disagrees."""
    from ablate.tracking.doctor import doctor as examine

    found = examine(ROOT, fix, storage=os.environ.get("OPTUNA_STORAGE"), tracking=os.environ.get("MLFLOW_TRACKING_URI"))
    if as_json:
        print(json.dumps([dataclasses.asdict(f) for f in found]))
    elif found:
        rows = [[f.study, f.problem, f.remedy, "yes" if f.fixed else "no"] for f in found]
        table_of("What does not agree", ["study", "problem", "remedy", "done"], rows)
    else:
        print("Everything agrees.")
    raise typer.Exit(1 if any(not f.fixed for f in found) else 0)


@app.command()
@example("reproduce 1a94e238e7b2 --keep")
def reproduce(
    run: Annotated[
        str,
        typer.Argument(help="A trial's hash or an MLflow run's id (8 characters do).", show_default=False),
    ],
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Keep its weights, for prune, evaluate and generate, where the two are equal."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a trial of yours or of a published report again and compare; exit code 1 where the two differ."""
    from ablate.tracking.reproduce import reproduce as again

    with busy(f"training {run} again", quiet=as_json):
        found = again(
            run, ROOT, tracking=os.environ.get("MLFLOW_TRACKING_URI"), keep=keep, observer=Steps(quiet=as_json)
        )
    if as_json:
        print(
            json.dumps(
                {
                    **dataclasses.asdict(found),
                    "equal": found.equal,
                    "largest_difference": found.largest_difference,
                    "weights": str(found.weights) if found.weights else None,
                }
            )
        )
    else:
        rows = [[str(step), f"{then!r}", f"{found.after.get(step)!r}"] for step, then in found.before.items()]
        table_of(f"Trial {found.trial}", ["step", f"{found.endpoint} then", f"{found.endpoint} now"], rows)
        for name, (then, now) in found.changed.items():
            print(f"{name}: {then} then, {now} now")
        print(found.verdict)
        if keep:
            print(
                f"weights: {found.weights}" if found.weights else "Its weights are not kept: they are another model's."
            )
    raise typer.Exit(0 if found.equal else 1)


@app.command()
@example("compare first first-longer")
def compare(study_a: Name, study_b: Name) -> None:
    """Compare two studies' findings: out/compare/A-B/."""
    from ablate.report import compare as comparing

    print(comparing.compare(study_a, study_b, ROOT))
