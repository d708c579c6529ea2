"""Verbs of the pipeline: prepare, study, collect, analyse, report, and looking after runs."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ablate.cli.common import (
    DATA,
    ROOT,
    Json,
    Name,
    Settings,
    StudyFile,
    among,
    app,
    example,
    study_app,
    table_of,
    with_progress,
)
from ablate.cli.waiting import Steps, busy, say
from ablate.config import ConfigError, Study, load_study, parse
from ablate.config.drafts import changed, changed_study
from ablate.files import write_text

if TYPE_CHECKING:
    from ablate.study.outcome import Outcome


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


@study_app.command("run")
@example("study run studies/laptop.yaml --workers 2")
def study_run(
    file: StudyFile,
    workers: Annotated[int, typer.Option(min=1, help="Processes; threads are divided among them.")] = 2,
    engine: Annotated[str, typer.Option(help="Where workers run: local, or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="ray: a running cluster's address; one of its own if not given.")
    ] = None,
    cpus_per_trial: Annotated[int, typer.Option(min=1, help="ray: cores of each worker.")] = 1,
    gpus_per_trial: Annotated[float, typer.Option(min=0, help="ray: GPUs of each worker; 0.5 lets two share one.")] = 0,
    storage: Annotated[
        str | None, typer.Option(envvar="OPTUNA_STORAGE", help="Optuna's database URL; SQLite in state/.")
    ] = None,
    tracking: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's URI; SQLite in state/.")
    ] = None,
    settings: Settings = None,
    as_name: Annotated[
        str | None, typer.Option("--as", help="Name of the copy that --set makes.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every trial of a study that has no result yet. Killed? Call it again: it goes on where it stopped.

    With --set, a copy of the study with these settings is written beside it and run; the study itself stays as it is.
    """
    if settings:
        file = changed_study(file, settings, as_name)
        say(f"{file}: the study with {', '.join(settings)}")
    elif as_name:
        raise ConfigError(f"as is {as_name!r}: it names the copy that --set makes, and --set is not given")
    study = load_study(file)  # before what takes seconds to import
    among([engine], ["local", "ray"], "engine")

    from ablate.study.outcome import finished, remember

    places = [storage, tracking]
    outcome = finished(study, ROOT, places)
    if outcome is None:
        ray = (address, cpus_per_trial, gpus_per_trial) if engine == "ray" else None
        outcome = _run(study, workers, storage, tracking, ray)
        remember(study, ROOT, places, outcome)
    if as_json:
        print(json.dumps(dataclasses.asdict(outcome)))
    else:
        print(f"{outcome.done} of {outcome.total} trials done. {outcome.message}".rstrip())
    for failure in outcome.failed:
        print(f"ablate: failed: {failure}", file=sys.stderr)
    raise typer.Exit(outcome.exit_code)


def _run(
    study: Study,
    workers: int,
    storage: str | None,
    tracking: str | None,
    ray: tuple[str | None, int, float] | None,
) -> Outcome:
    """Run a study with local workers, or on Ray with an address, cores and GPUs a trial."""
    with busy("starting"):  # imports take seconds
        from ablate.study.runner import Engine, run_study
        from ablate.tracking.store import default_uri
        from ablate.tracking.tracker import MlflowTracker

    engine: Engine | None = None
    if ray is not None:
        try:
            from ablate.study.ray_engine import RayEngine
        except ModuleNotFoundError:
            raise ConfigError("engine is 'ray': it needs the extra `ray`; pip install -e '.[ray]'") from None
        address, cpus, gpus = ray
        engine = RayEngine(workers, address, cpus_per_trial=cpus, gpus_per_trial=gpus)
    tracker = MlflowTracker(tracking or default_uri(ROOT.resolve()))
    return run_study(study, ROOT, workers=workers, storage=storage, tracker=tracker, engine=engine)


@app.command()
@example("collect laptop")
def collect(name: Name) -> None:
    """Export a study's results to tables/NAME/{trials,history,usage,trees,prune}.parquet."""
    from ablate.results import collect as tables

    print(tables.collect(name, ROOT))


@app.command()
@example("analyse laptop")
def analyse(name: Name) -> None:
    """Turn a study's tables into findings: out/NAME/findings.json, also logged to the study's MLflow run."""
    from ablate.analysis import findings

    print(findings.analyse(name, ROOT))
    _log(name, ["findings.json", "metrics.json"])


@app.command()
@example("report laptop")
def report(
    name: Name,
    address: Annotated[
        str | None, typer.Option(envvar="ABLATE_MLFLOW_ADDRESS", help="MLflow's address, for links to runs.")
    ] = None,
) -> None:
    """Write a study's report: out/NAME/index.html, report.md, figures and tables; logged to the study's MLflow run."""
    from ablate.report import build

    print(build.build(name, ROOT, address))
    _log(name, ["findings.json", "metrics.json", "index.html", "report.md", "figures"])


def _log(name: str, files: list[str]) -> None:
    """Log what was written to MLflow; the files on disk do not depend on it."""
    from ablate.tracking.log_report import log_report

    try:
        log_report(name, ROOT, files, tracking=os.environ.get("MLFLOW_TRACKING_URI"))
    except ConfigError as error:
        print(f"ablate: not logged to MLflow: {error}", file=sys.stderr)


@app.command()
@example("publish laptop")
def publish(name: Name) -> None:
    """Copy a study's tables to reports/NAME/data, from which `ablate figures` draws its report."""
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

    known = published.published(ROOT)
    chosen = list(dict.fromkeys(among(names, known, "published study"))) if names else known
    if not chosen:
        raise ConfigError("no study is published in 'reports': `ablate publish NAME` does it")
    slowest_first = sorted(chosen, key=lambda name: -published.size(name, ROOT))
    # Matplotlib makes small objects by the million; looking for dead ones less often saves a tenth of the time.
    workers = min(len(chosen), os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers, gc.set_threshold, (200_000,)) as pool:
        redrawn = pool.starmap(published.redraw, [(name, ROOT) for name in slowest_first], chunksize=1)
    found = dict(sorted(zip(slowest_first, redrawn, strict=True)))
    if as_json:
        print(json.dumps(found))
    else:
        for name, changed in found.items():
            print(f"{name}: {'differs: ' + ', '.join(changed) if changed else 'the same data'}")
    raise typer.Exit(1 if any(found.values()) else 0)


@app.command()
@example("ui")
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow's UI on this project's runs, on 127.0.0.1 only (it has no authentication)."""
    from ablate.tracking.store import serve

    raise typer.Exit(serve(ROOT.resolve(), port))


@study_app.command("plan")
@example("study plan studies/laptop.yaml --workers 2")
def study_plan(
    file: StudyFile,
    workers: Annotated[int, typer.Option(min=1, help="Local processes that the prediction is for.")] = 2,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show arms or a search's space, trials and the predicted wall time (from short probes), and run nothing."""
    from ablate.model.counts import count
    from ablate.study.forecast import forecast

    study = parse(Study, changed(file, settings)) if settings else load_study(file)
    found = forecast(study, ROOT, workers=workers, say=(lambda text: None) if as_json else say)
    rows = []
    for arm in found.plan.arms:
        of_arm = [t for t in found.plan.trials if t.arm == arm.label]
        cost = count(of_arm[0].trial, of_arm[0].trial.corpus.vocab_size) if of_arm else None
        rows.append(
            {
                "arm": arm.label,
                "trials": len(of_arm),
                "total_units": cost.total_units if cost else None,
                "active_units": cost.active_units if cost else None,
                "flops_per_token": cost.flops_per_token if cost else None,
                "seconds": found.seconds_by_arm.get(arm.label),
            }
        )
    whole = {
        "trials": found.trials,
        "tokens": found.tokens,
        "seconds": found.seconds,
        "seconds_more": found.seconds_more,
        "tuning": dict(zip(("least", "most"), found.plan.tuning, strict=True)),
        "plan_hash": found.plan.hash,
        "notes": found.plan.notes,
        "arms": rows,
        "space": [dict(zip(("factor", "values", "where"), row, strict=True)) for row in found.space],
    }
    if as_json:
        print(json.dumps(whole))
        return
    if found.space:
        table_of(f"Search {found.plan.hash}", ["factor", "values", "where"], [list(row) for row in found.space])
    else:
        cells = [
            [str(r["arm"]), *(f"{v:,.0f}" if isinstance(v, int | float) else "-" for v in list(r.values())[1:])]
            for r in rows
        ]
        columns = ["arm", "trials", "units", "active", "FLOPs a token", "seconds a trial"]
        table_of(f"Plan {found.plan.hash}", columns, cells)
    for note in found.plan.notes:
        print(note)
    if found.plan.tuning[1]:
        print(found.plan.tuning_text)
    more = f", at most {found.seconds_more / 60:.1f} more for rates" if found.seconds_more else ""
    print(
        f"{found.trials} trials to do, {found.tokens:,} training tokens, about {found.seconds / 60:.1f} minutes{more}"
    )


@study_app.command("status")
@example("study status laptop")
def study_status(name: Name, as_json: Json = False) -> None:
    """Show how far a study is: trials by state, the best, failures, and the time left while it runs."""
    from ablate.study.status import status

    now = status(name, ROOT, os.environ.get("OPTUNA_STORAGE"))
    if as_json:
        print(json.dumps(dataclasses.asdict(now)))
        return
    rows = [["done", f"{now.done} of {now.total or '?'}"], *([k, str(v)] for k, v in now.by_status.items())]
    rows.append(["running", "yes" if now.running else "no"])
    if now.tuning is not None:
        rows.append(["learning rates", str(now.tuning)])
    if now.seconds_left is not None:
        rows.append(["time left", f"about {now.seconds_left / 60:.1f} minutes"])
    if now.candidates is not None:
        rows.append(["candidates", str(now.candidates)])
    rows += [["best", str(leader)] for leader in now.best]
    rows.append(["Optuna", now.storage])
    table_of(f"Study {now.study} ({now.design})", ["", ""], rows + [["failed", failure] for failure in now.failures])


@study_app.command("promote")
@example("study promote search --top 3")
def study_promote(
    name: Name,
    top: Annotated[int, typer.Option(min=1, help="Candidates that become arms.")] = 3,
) -> None:
    """Write studies/NAME-confirm.yaml: the best candidates of a search against its base, on seeds it never used."""
    from ablate.analysis.search.promote import promote

    path = promote(name, ROOT, top)
    print(f"{path}: look at it, then run `ablate study plan {path}`")


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
        rows = [[str(step), f"{bpb!r}", f"{found.after.get(step)!r}"] for step, bpb in found.before.items()]
        table_of(f"Trial {found.trial}", ["step", "bpb then", "bpb now"], rows)
        for name, (then, now) in found.changed.items():
            print(f"{name}: {then} then, {now} now")
        print("Equal bit for bit." if found.equal else f"Not equal: bpb differs by up to {found.largest_difference:g}.")
        if keep:
            print(
                f"weights: {found.weights}" if found.weights else "Its weights are not kept: they are another model's."
            )
    raise typer.Exit(0 if found.equal else 1)


@app.command()
@example("compare laptop laptop-longer")
def compare(study_a: Name, study_b: Name) -> None:
    """Compare two studies' findings: out/compare/A-B/."""
    from ablate.report import compare as comparing

    print(comparing.compare(study_a, study_b, ROOT))
