"""Verbs on a trained model or a configuration: prune, inspect, evaluate, generate, size."""

from __future__ import annotations

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
    Run,
    Threads,
    among,
    app,
    corpus_in,
    example,
    number,
    show,
    table_of,
)
from ablate.cli.waiting import busy
from ablate.config import ConfigError, echo, load_study
from ablate.config.text import is_text
from ablate.files import write_text
from ablate.results.layout import EVALUATION, ITEMS, PRUNED


@app.command()
@example("prune 1a94e238e7b2 --threshold 0.01/L")
def prune(
    run: Run,
    threshold: Annotated[
        str, typer.Option(help="Share of a tree's tokens at or under which a subtree goes; 0.01/L works.")
    ] = "0",
    data: Annotated[
        Path | None, typer.Option(help="A study file whose corpus is used; the model's own if not given.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens measured.")] = 65536,
    out: Annotated[
        Path | None, typer.Option(help="Where the pruned checkpoint goes; beside the model if not given.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Remove unused paths of a trained model for good; report what went, and what it cost beside two controls.

    What a study's trial showed on its own corpus is kept beside its result, for `ablate collect` and the report.
    """
    from ablate.training.runs import find_checkpoint, is_own

    found = find_checkpoint(run, ROOT)  # before torch is imported, which takes seconds

    with busy(f"pruning {found}", quiet=as_json):
        import torch

        from ablate.balance.prune import prune_report, report_table, threshold_share
        from ablate.data.windows import evaluation_batches
        from ablate.evaluation.bits_per_byte import bits_per_byte
        from ablate.evaluation.evaluate import corpus_of
        from ablate.results.record import save_prune
        from ablate.training.checkpoint import load_model, save_model

        if threads is not None:
            torch.set_num_threads(threads)
        model, trial, tokenizer = load_model(found)
        share = threshold_share(threshold, trial.tree.leaves)
        own = corpus_of(trial, tokenizer, DATA)
        corpus = own if data is None else corpus_in(data)
        if corpus.tokenizer_hash != own.tokenizer_hash:
            raise ConfigError(
                f"data is {str(data)!r}: its tokenizer {corpus.tokenizer_hash} is not the model's {own.tokenizer_hash}"
            )
        context = trial.model.context

        batches = evaluation_batches(corpus.validation, context, tokens)
        # Paths are chosen on validation text and judged on test text, where there is enough of it.
        judged = evaluation_batches(corpus.test, context, tokens) if len(corpus.test) > context else batches
        lengths = torch.tensor(own.token_bytes)
        pruned, report = prune_report(
            model,
            [b["tokens"][:, :-1] for b in batches],
            lambda candidate: bits_per_byte(candidate, judged, lengths),
            share,
        )
        path = out or found.with_name(PRUNED)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(path, pruned, trial, tokenizer)
    # Only a trial's own weights on its own corpus are compared with its result.
    kept = save_prune(ROOT, trial.hash(), report) if data is None and is_own(found, trial, ROOT) else []
    table = report_table(report)
    if as_json:
        print(
            json.dumps({**report.model_dump(mode="json"), "checkpoint": str(path), "results": [str(p) for p in kept]})
        )
    else:
        show(table)
        print(*[path, *kept], sep="\n")


@app.command()
@example("inspect 1a94e238e7b2 --html trees.html")
def inspect(
    run: Run,
    step: Annotated[int | None, typer.Option(help="An evaluation's step; the last if not given.")] = None,
    tree: Annotated[int | None, typer.Option(help="A tree's number; each layer's least balanced if not given.")] = None,
    levels: Annotated[int, typer.Option(min=1, help="How far down nodes are drawn.")] = 4,
    html: Annotated[Path | None, typer.Option(help="Write an interactive page here instead.")] = None,
) -> None:
    """Draw a trial's trees with their shares of the tokens and their gradient skew."""
    from ablate.balance import inspect as inspection
    from ablate.training.runs import find_usage

    table = find_usage(run, ROOT)
    frame = inspection.load(table)
    title = f"{table.parent.name} {table.name.partition('.')[0]}"
    if html is not None:
        write_text(html, inspection.page(frame, title))
        print(html)
    else:
        show(inspection.terminal(frame, step=step, tree=tree, levels=levels))


@app.command()
@example("evaluate 1a94e238e7b2 --shots 0,5")
def evaluate(
    run: Run,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated tasks, '' for none; the offline ones if not given and the extra qa is there."
        ),
    ] = None,
    shots: Annotated[str, typer.Option(help="Comma-separated numbers of examples shown before a question.")] = "0,5",
    data: Annotated[list[Path] | None, typer.Option(help="Study files whose corpora give bits per byte too.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Bits per byte and question answering (EleutherAI's harness) of a trained model; a trial's is logged to its run."""
    from ablate.evaluation import harness
    from ablate.training.runs import find_checkpoint, is_own

    numbers = [number(part) for part in shots.split(",")]
    path = find_checkpoint(run, ROOT)  # before torch is imported, which takes seconds

    if tasks is None and not harness.installed():
        tasks = ""
        print(f"ablate: bits per byte only: {harness.MISSING}", file=sys.stderr)
    elif tasks:
        harness.require()
    with busy("measuring the model", quiet=as_json):
        from ablate.evaluation import evaluate as evaluation
        from ablate.evaluation.tasks import OFFLINE
        from ablate.training.checkpoint import load_model

        model, trial, tokenizer = load_model(path)
        own = evaluation.corpus_of(trial, tokenizer, DATA)
        found = evaluation.evaluate(
            model,
            trial,
            own,
            corpora=[corpus_in(file) for file in data or []],
            task_names=OFFLINE if tasks is None else [t for t in tasks.split(",") if t],
            shots=numbers,
            folder=path.parent,
            tasks_folder=Path("state") / "tasks",
            limit=limit,
        )
    if is_own(path, trial, ROOT):
        from ablate.tracking.log_report import log_evaluation

        files = [path.with_name(EVALUATION), path.with_name(ITEMS)]
        try:
            log_evaluation(found, files, ROOT, tracking=os.environ.get("MLFLOW_TRACKING_URI"))
        except ConfigError as error:
            print(f"ablate: written to {files[0]}, but not logged to MLflow: {error}", file=sys.stderr)
    if as_json:
        print(found.model_dump_json())
    else:
        table_of(f"Trial {found.trial}", ["metric", "value"], [[k, f"{v:.4f}"] for k, v in found.metrics().items()])


@app.command()
@example("generate 1a94e238e7b2 'def parse(' --temperature 0.8 --top-k 40")
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write on from a prompt, with a key-value cache; each token touches one path a tree."""
    from ablate.training.runs import find_checkpoint

    if not is_text(prompt):
        raise ConfigError(f"prompt is {echo(prompt)}: text in UTF-8 is expected")
    path = find_checkpoint(run, ROOT)  # before torch is imported, which takes seconds

    with busy("loading the model"):
        from ablate.evaluation.evaluate import corpus_of
        from ablate.evaluation.generate import Sampling, stream
        from ablate.training.checkpoint import load_model

        sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
        model, trial, tokenizer = load_model(path)
        own = corpus_of(trial, tokenizer, DATA)
    print(prompt, end="", flush=True)
    try:
        for piece in stream(model, own.codec, prompt, max_tokens=max_tokens, sampling=sampling):
            print(piece, end="", flush=True)
    finally:
        print()  # also where it is stopped: what is said of that begins a line


@app.command()
@example("keys 1a94e238e7b2 --block 1 --count 8192 --out keys.npy")
def keys(
    run: Run,
    out: Annotated[Path, typer.Option(help="Where the vectors go, as a NumPy file.")] = Path("keys.npy"),
    block: Annotated[int, typer.Option(min=0, help="Which block's feed-forward layer; 0 is the first.")] = 0,
    count: Annotated[int, typer.Option(min=2, help="Vectors wanted.")] = 8192,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens that the model reads.")] = 65536,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw among all positions.")] = 0,
) -> None:
    """Write inputs of a trained model's feed-forward layer, for task facts with `keys: residual`."""
    from ablate.training.runs import find_checkpoint

    path = find_checkpoint(run, ROOT)  # before torch is imported, which takes seconds
    with busy("running the model"):
        import numpy as np
        import torch

        from ablate.data.windows import evaluation_batches
        from ablate.evaluation.evaluate import corpus_of
        from ablate.evaluation.residual import residual_keys
        from ablate.files import replacing
        from ablate.training.checkpoint import load_model

        model, trial, tokenizer = load_model(path)
        batches = evaluation_batches(corpus_of(trial, tokenizer, DATA).validation, trial.model.context, tokens)
        vectors = residual_keys(model, torch.cat([b["tokens"][:, :-1] for b in batches]), block, count, seed)
        with replacing(out) as partial, partial.open("wb") as file:
            np.save(file, vectors)
    print(f"{out}: {len(vectors):,} vectors of width {vectors.shape[1]} from block {block} of {path}")


@app.command()
@example("size --preset gpt-1.3b --tokens-per-second 12000")
def size(
    file: Annotated[Path | None, typer.Argument(help="A study file, for its base.", show_default=False)] = None,
    preset: Annotated[str, typer.Option(help="A preset, where no study file is given.")] = "nano",
    tokens_per_second: Annotated[float | None, typer.Option(help="Throughput of one GPU, for tokens a day.")] = None,
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs a token, and memory per device on 1 to 64 GPUs of a configuration, built on no device."""
    from ablate.config import PRESETS, Trial, parse
    from ablate.model import size as sizes

    among([preset], list(PRESETS), "preset")
    trial = load_study(file).trial({}) if file is not None else parse(Trial, PRESETS[preset])
    found = sizes.size(trial, tokens_per_second=tokens_per_second)
    print(found.model_dump_json() if as_json else sizes.describe(found))
