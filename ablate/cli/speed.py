"""Verbs that measure speed and compile kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ablate.cli.common import (
    DATA,
    Json,
    Threads,
    among,
    bench_app,
    example,
    kernels_app,
    table_of,
)
from ablate.cli.waiting import busy, say
from ablate.config import ConfigError


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

    trial.run(
        among(preset or list(trial.BATCH), list(trial.BATCH), "preset"), threads=threads, steps=steps, as_json=as_json
    )


TIMES = ("seconds", "training", "trials_an_hour")


@bench_app.command("tasks")
@example("bench tasks --task facts --json")
def bench_tasks(
    task: Annotated[
        list[str] | None, typer.Option(help="language, facts, teacher or digits; all if not given.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each trial.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each trial; the task's own if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Seconds of a whole trial of each task, evaluations and files included: trees, and a dense layer of all their units."""
    from ablate.bench import tasks

    kinds = among(task or list(tasks.SIZES), list(tasks.SIZES), "task")
    with busy(f"timing trials of {', '.join(kinds)}", quiet=as_json):
        rows = tasks.run(kinds, DATA, threads=threads, steps=steps, as_json=as_json)
    if not as_json:
        columns = ["task", "contender", "steps", "evaluations", "seconds", "in steps", "trials an hour"]
        cells = [
            [r["task"], r["contender"], *(str(r[k]) for k in ("steps", "evaluations")), *(f"{r[k]:.1f}" for k in TIMES)]
            for r in rows
        ]
        table_of(f"A trial on {threads} {'thread' if threads == 1 else 'threads'}", columns, cells)


@bench_app.command("study")
@example("bench study --against ../other --rounds 5")
def bench_study(
    name: Annotated[str, typer.Option(help="Whose trials: first, confirm or facts.")] = "first",
    workers: Annotated[int, typer.Option(min=1, help="Processes; threads are divided among them.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of the study; with --against, pairs.")] = 1,
    against: Annotated[
        Path | None, typer.Option(help="Another checkout of the project, run in turn with this one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Trials an hour of a small study, and where the seconds of a trial go; two commits side by side."""
    import statistics

    from ablate.bench import study

    among([name], list(study.STUDIES), "name")
    rows = study.run(name, workers=workers, rounds=rounds, against=against, say=say)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    parts = {who: study.breakdown(rows, who) for who in contenders}
    cells = [[part, *(f"{parts[who][part]:.2f}" for who in contenders)] for part in parts[contenders[0]]]
    for shown, key, digits in (
        ("trials an hour", "trials_an_hour", 0),
        ("CPU seconds", "cpu_seconds", 2),
        ("busy", "busy", 2),
        ("a later trial starts in", "later_start", 2),
    ):
        values = [statistics.median(r[key] or 0.0 for r in rows if r["contender"] == who) for who in contenders]
        cells.append([shown, *(f"{value:.{digits}f}" for value in values)])
    table_of(f"Core seconds of a trial, {workers} workers, medians of {rounds}", ["part", *contenders], cells)
    for words, key in (("trials an hour", "trials_an_hour"), ("CPU seconds", "cpu_seconds")):
        if pairs := study.ratios(rows, key):
            spread = f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f}, {rounds} pairs)"
            print(f"{words}, this over the other: {spread}")


@bench_app.command("search")
@example("bench search --budget 90 --repetitions 50")
def bench_search(
    budget: Annotated[int, typer.Option(min=20, help="Training runs of each search.")] = 90,
    repetitions: Annotated[int, typer.Option(min=2, help="Searches of each rule.")] = 50,
    as_json: Json = False,
) -> None:
    """Racing against plain search on a planted landscape: how far what is named lies from the optimum. Trains nothing."""
    from rich.console import Console
    from rich.progress import track

    from ablate.bench.search import RULES, measure

    rules = track(RULES, "searching", console=Console(stderr=True), transient=True, disable=as_json)
    rows = [measure(rule, budget, repetitions) for rule in rules]
    if as_json:
        print(json.dumps(rows))
        return
    cells = [
        [
            str(r["rule"]),
            f"{r['regret']:.4f} ± {r['half_width']:.4f}",
            *(f"{r[k]:.4f}" for k in ("worst_tenth", "optimism")),
            f"{r['candidates']:.0f}",
            f"{r['runs']:.0f}",
        ]
        for r in rows
    ]
    table_of("Search", ["rule", "regret", "worst tenth", "optimism", "candidates", "runs"], cells)


@kernels_app.command("compile")
@example("kernels compile --target sm_90 --json")
def kernels_compile(
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_86, sm_89, sm_90, sm_120 or gfx942; all if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile every GPU kernel and configuration ahead of time, without a GPU or driver, and print what each needs."""
    from ablate.kernels.triton import aot as compiler

    raise typer.Exit(compiler.run(among(target or list(compiler.TARGETS), list(compiler.TARGETS), "target"), as_json))


@bench_app.command("layer")
@example("bench layer --shapes A,C --threads 2 --json")
def bench_layer(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shapes: Annotated[str, typer.Option(help="Comma-separated shapes: A, B, C.")] = "A,B,C",
    threads: Threads = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the table to this file.")] = None,
    passes: Annotated[str, typer.Option(help="forward, forward_backward, or both.")] = "forward,forward_backward",
    routings: Annotated[str, typer.Option(help="iid, skewed, or both.")] = "iid,skewed",
    contenders: Annotated[
        str | None,
        typer.Option(help="Comma-separated; if not given all but the compiled ones and fastfeedforward (minutes)."),
    ] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Instead: time and memory of a step for depths 6 to 12.")
    ] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="Instead: a step with 1, 2, 4, … threads.")] = False,
    as_json: Json = False,
) -> None:
    """One tree layer beside dense, masked, UltraFastBERT and mixture-of-experts layers; correctness comes first."""
    from ablate.bench import layer
    from ablate.bench.contenders import CONTENDERS, DEFAULT, SHAPES

    among([device], ["cpu", "cuda"], "device")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("device is 'cuda': no CUDA or ROCm device is here; use cpu")
    names = among(shapes.split(","), list(SHAPES), "shapes")
    if growth or scaling:
        from ablate.bench import layer_modes

        if device != "cpu":
            raise ConfigError(f"device is {device!r}: --growth and --scaling measure the cpu")
        if growth:
            layer_modes.growth(threads=threads, as_json=as_json)
        if scaling:
            layer_modes.scaling(names, as_json=as_json)
        return
    layer.run(
        names,
        device,
        threads=threads,
        as_json=as_json,
        passes=among(passes.split(","), list(layer.PASSES), "passes"),
        routings=among(routings.split(","), list(layer.ROUTINGS), "routings"),
        plot=plot,
        contenders=DEFAULT if contenders is None else among(contenders.split(","), list(CONTENDERS), "contenders"),
    )


@bench_app.command("decode")
@example("bench decode --preset nano")
def bench_decode(
    preset: Annotated[list[str] | None, typer.Option(help="nano or small; nano if not given.")] = None,
    threads: Threads = None,
    tokens: Annotated[int, typer.Option(min=1, help="Timed tokens.")] = 64,
    as_json: Json = False,
) -> None:
    """Tokens/s of generation, one token at a time: tree against dense of equal total units."""
    from ablate.bench import decode

    decode.run(among(preset or ["nano"], ["nano", "small"], "preset"), threads=threads, tokens=tokens, as_json=as_json)
