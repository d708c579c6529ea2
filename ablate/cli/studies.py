"""Verbs of a study: plan, run, status, promote."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ablate.cli.common import (
    ROOT,
    Json,
    Name,
    Settings,
    StudyFile,
    among,
    example,
    study_app,
    table_of,
)
from ablate.cli.waiting import busy, say
from ablate.config import ConfigError, Study, load_study, parse
from ablate.config.drafts import changed, changed_study, placed_study

if TYPE_CHECKING:
    from ablate.study.outcome import Outcome


@study_app.command("run")
@example("study run studies/first.yaml --workers 2")
def study_run(
    file: StudyFile,
    workers: Annotated[
        int, typer.Option(min=1, envvar="ABLATE_WORKERS", help="Processes; threads are divided among them.")
    ] = 2,
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
    study = placed_study(file, ROOT)  # before what takes seconds to import
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
    if outcome.signal is not None:
        say("ablate: stopped; results and checkpoints are kept, run the study again and it goes on")
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
        from ablate.study.runner import run_study
        from ablate.study.session import Engine
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


@study_app.command("plan")
@example("study plan studies/first.yaml --workers 2")
def study_plan(
    file: StudyFile,
    workers: Annotated[int, typer.Option(min=1, help="Local processes that the prediction is for.")] = 2,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show arms or a search's space, trials and the predicted wall time (from short probes), and run nothing."""
    from ablate.study.forecast import forecast
    from ablate.tasks.registry import planned_cost
    from ablate.tracking.store import default_uri
    from ablate.tracking.tracker import MlflowTracker

    study = parse(Study, changed(file, settings)) if settings else load_study(file)
    tracker = MlflowTracker(default_uri(ROOT.resolve()))  # as a run has one; nothing is written to it
    found = forecast(study, ROOT, workers=workers, tracker=tracker, say=(lambda text: None) if as_json else say)
    rows = []
    for arm in found.plan.arms:
        of_arm = [t for t in found.plan.trials if t.arm == arm.label]
        cost = planned_cost(of_arm[0].trial) if of_arm else None
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
@example("study status first")
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
    if now.waiting:
        rows.append(["wait for a larger budget", ", ".join(now.waiting)])
    rows += [["best", str(leader)] for leader in now.best]
    rows.append(["Optuna", now.storage])
    table_of(f"Study {now.study} ({now.design})", ["", ""], rows + [["failed", failure] for failure in now.failures])


@study_app.command("promote")
@example("study promote search --top 3")
def study_promote(
    name: Name,
    top: Annotated[int, typer.Option(min=1, help="Candidates or arms that it has at most.")] = 3,
) -> None:
    """Write studies/NAME-confirm.yaml, on seeds never used: a study's best arms or candidates, or what it left open."""
    if load_study(ROOT / "studies" / f"{name}.yaml").design == "search":
        from ablate.analysis.search.promote import promote as follow_up
    else:
        from ablate.analysis.follow_up import follow_up

    path = follow_up(name, ROOT, top)
    print(f"{path}: look at it, then run `ablate study plan {path}`")
