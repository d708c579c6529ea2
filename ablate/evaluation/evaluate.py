"""`ablate evaluate`: a trained model's bits per byte on prepared corpora, and question answering through the harness.

Every value has a standard error. Questions of one document are not independent, so for the offline tasks errors are
clustered by document, and for bits per byte by window of the text. What each question gave is kept in a table.
"""

# lm_eval has no types.
# mypy: disable-error-code="import-untyped"
from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.config import ConfigError, Questions, Trial
from ablate.data.codec import Codec
from ablate.data.tokens import Prepared, load
from ablate.data.windows import evaluation_batches
from ablate.evaluation import harness, qa, tasks
from ablate.evaluation.likelihood import Scorer
from ablate.evaluation.scores import Evaluated, Quality, Score
from ablate.files import write_text
from ablate.model.transformer import Transformer
from ablate.results.layout import EVALUATION, ITEMS

FEWSHOT_SEED = 1234
"""The harness's default."""
BOOTSTRAP = 1000
"""Resamples for the harness's metrics that have no closed standard error."""
_UNKNOWN = (
    f"task {{}} is not known: {', '.join(tasks.OFFLINE)} or one of lm-eval's (see `lm-eval ls tasks`) is expected"
)

ITEMS_SCHEMA: dict[str, pl.DataType] = {
    "task": pl.String(),
    "shots": pl.Int64(),
    "item": pl.Int64(),  # the question's place in the task
    "document": pl.String(),  # offline tasks: the held-out document it was made of
    "scorer": pl.String(),  # model or unigram
    "metric": pl.String(),  # the task's metrics, and log_likelihood/<choice>
    "value": pl.Float64(),
    "text": pl.String(),  # metric `response`: what the model wrote
}


def corpus_of(trial: Trial, tokenizer_hash: str, data_root: Path) -> Prepared:
    """The prepared corpus a model was trained on. Raises ConfigError where it is not there, or is another one now."""
    prepared = load(trial.corpus, data_root)
    if prepared.tokenizer_hash != tokenizer_hash:
        raise ConfigError(
            f"tokenizer of {str(prepared.folder)!r} has the hash {prepared.tokenizer_hash}: the model was trained with "
            f"{tokenizer_hash}, from other text of the same settings"
        )
    return prepared


def evaluate(
    model: Transformer,
    trial: Trial,
    own: Prepared,
    *,
    corpora: Sequence[Prepared] = (),
    task_names: Sequence[str] = tasks.OFFLINE,
    shots: Sequence[int] = (0, 5),
    folder: Path,
    tasks_folder: Path,
    limit: int | None = None,
) -> Evaluated:
    """Bits per byte on `own` (the model's corpus) and `corpora`, then every task at every number of shots.

    Writes evaluation.json and items.parquet to `folder`. Tasks are the offline ones, whose files go to `tasks_folder`,
    and any of the harness's, which are fetched. `limit` takes the first so many questions of each. Raises ConfigError
    for names that are not tasks, and where the extra `qa` is missing.
    """
    if task_names:
        harness.require()
    quality = [bits_per_byte_of(model, c, own, trial.train.eval_tokens) for c in (own, *corpora)]
    asked = Questions(tasks=tuple(task_names), shots=tuple(shots), limit=limit)
    scores = ask(model, own, asked, folder=folder, tasks_folder=tasks_folder)
    result = Evaluated(trial=trial.hash(), tokenizer_hash=own.tokenizer_hash, quality=quality, scores=scores)
    write_text(folder / EVALUATION, result.model_dump_json(indent=1) + "\n")
    return result


def ask(model: Transformer, own: Prepared, questions: Questions, *, folder: Path, tasks_folder: Path) -> list[Score]:
    """Every task at every number of shots; writes items.parquet to `folder`. `own` is the model's corpus."""
    scores: list[Score] = []
    rows: list[pl.DataFrame] = []
    limit = questions.limit
    offline = set(questions.tasks) & set(tasks.OFFLINE)
    written = tasks.write_tasks(own, tasks_folder) if offline else tasks_folder
    for task in dict.fromkeys(questions.tasks):
        path = written / f"{task}.yaml" if task in offline else None
        # Token frequencies know no context, so shots change nothing.
        baseline = _harness(_unigram(own, model.context), task, 0, path, limit)[1][task] if path else []
        for count in dict.fromkeys(questions.shots):
            lm = qa.harness_model(model, own)
            results, samples = _harness(lm, task, count, path, limit)
            scorer: Scorer = lm.scorer
            truncated = scorer.truncated / max(1, scorer.requests)
            if path:
                found, items = _offline_scores(task, count, samples[task], baseline, truncated)
            else:
                found, items = _plain_scores(count, results, samples, truncated)
            scores += found
            rows.append(items)
    folder.mkdir(parents=True, exist_ok=True)
    pl.concat(rows or [pl.DataFrame(schema=ITEMS_SCHEMA)]).write_parquet(folder / ITEMS)
    return scores


def check_tasks(questions: Questions, own: Prepared, tasks_folder: Path) -> None:
    """Refuse, before anything is trained, what cannot be asked: raises ConfigError for a missing extra, an unknown task
    or a corpus with too few held-out documents.
    """
    if not questions.tasks:
        return
    harness.require()
    if set(questions.tasks) & set(tasks.OFFLINE):
        tasks.write_tasks(own, tasks_folder)
    fetched = [task for task in questions.tasks if task not in tasks.OFFLINE]
    for task in fetched:
        if task not in _known_tasks().all_tasks:
            raise ConfigError(_UNKNOWN.format(repr(task)))


# --- bits per byte


def bits_per_byte_of(model: Transformer, corpus: Prepared, own: Prepared, tokens: int) -> Quality:
    """On the validation text of any prepared corpus, written in the tokens of `own`; at least `tokens` tokens of it.

    For the model's own corpus the slice and the value are those of training. Raises ConfigError for too short a text.
    """
    if corpus.tokenizer_hash != own.tokenizer_hash:
        stream = _encoded(corpus.held_out("validation")["text"].to_list(), own.codec)
        corpus = dataclasses.replace(corpus, validation=stream, token_bytes=own.token_bytes, end_id=own.end_id)
    batches = evaluation_batches(corpus.validation, model.context, tokens)
    token_bytes = torch.from_numpy(np.asarray(own.token_bytes, dtype=np.int64))
    bits, lengths = _window_bits(model.eval(), batches, token_bytes)
    if not lengths.sum():
        raise ConfigError(f"corpus {str(corpus.folder)!r} has no byte of validation text to evaluate on")
    bpb, error = _ratio(bits, lengths)
    source = corpus.card["source"]
    return Quality(
        corpus=_corpus_name(source),
        data_hash=corpus.data_hash,
        bpb=bpb,
        error=error,
        tokens=sum(batch["tokens"][:, 1:].numel() for batch in batches),
        bytes=int(lengths.sum()),
    )


def _corpus_name(source: dict[str, Any]) -> str:
    kind = source["source"]
    if kind == "files":
        return Path(source["path"]).name
    return str(source.get("preset") or source.get("name") or kind)


def _encoded(texts: list[str], codec: Codec) -> npt.NDArray[np.uint32]:
    """Documents in a codec's ids, each followed by the end mark, as a stream is packed."""
    end = np.array([codec.end_id], np.uint32)
    return np.concatenate([part for ids in codec.encode_batch(texts) for part in (ids, end)])


@torch.inference_mode()
def _window_bits(
    model: Transformer, batches: Iterable[dict[str, Tensor]], token_bytes: Tensor
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Bits and bytes of every window."""
    device = model.embedding.device
    token_bytes = token_bytes.to(device)
    bits, lengths = [], []
    for batch in batches:
        tokens = batch["tokens"].to(device)
        targets = tokens[:, 1:]
        logits = model(tokens[:, :-1]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").double()
        bits.append(nats.view_as(targets).sum(1) / math.log(2))
        lengths.append(token_bytes[targets].sum(1))
    return torch.cat(bits).cpu().numpy(), torch.cat(lengths).double().cpu().numpy()


def _ratio(numerator: npt.NDArray[np.float64], denominator: npt.NDArray[np.float64]) -> tuple[float, float]:
    """sum / sum, and its standard error over units by linearisation (Cochran, Sampling Techniques, section 2.11)."""
    value = float(numerator.sum() / denominator.sum())
    units = len(numerator)
    if units < 2:
        return value, math.inf
    rest = numerator - value * denominator
    return value, float(np.sqrt(units / (units - 1) * (rest**2).sum()) / denominator.sum())


# --- tasks


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Standard error of a mean whose items come in clusters; inf with fewer than two of them."""
    table = pl.DataFrame({"value": values, "cluster": clusters}).group_by("cluster", maintain_order=True)
    sums = table.agg(pl.col("value").sum(), pl.len().alias("count"))
    return _ratio(sums["value"].to_numpy(), sums["count"].cast(pl.Float64).to_numpy())[1]


def _harness(
    lm: Any, task: str, shots: int, path: Path | None, limit: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The harness's results and samples by task (a group has several)."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # The offline tasks take seconds: no progress bars of their parts.
    with contextlib.redirect_stderr(io.StringIO()) if path else contextlib.nullcontext():
        try:
            manager = TaskManager(include_defaults=False) if path else _known_tasks()
            loaded = manager.load([str(path) if path else task])
        except OSError as error:
            raise ConfigError(f"task {task!r} cannot be fetched: {str(error).splitlines()[0]}") from None
        except KeyError:
            raise ConfigError(_UNKNOWN.format(repr(task))) from None
        for one in loaded["tasks"].values():
            if one.get_config("num_fewshot") != 0:  # a task that fixes 0 keeps it, as in the harness
                one.set_config(key="num_fewshot", value=shots)
            one.set_fewshot_seed(seed=FEWSHOT_SEED)
        found = evaluator.evaluate(lm, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP)
    return found["results"], found["samples"]


@functools.cache
def _known_tasks() -> Any:
    """The harness's index of its tasks: thousands of files, read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _unigram(own: Prepared, context: int) -> Any:
    """Token frequencies of the training split as a language model: every position has the same logits."""
    counts = np.bincount(own.train, minlength=own.vocab_size) + 1.0
    logits = torch.from_numpy(np.log(counts)).float()
    scorer = Scorer(lambda ids: logits.expand(*ids.shape, -1), context)
    return qa.wrap(scorer, encode=own.encode, decode=own.decode, end_id=own.end_id)


def _offline_scores(
    task: str, shots: int, samples: list[dict[str, Any]], baseline: list[dict[str, Any]], truncated: float
) -> tuple[list[Score], pl.DataFrame]:
    documents = [sample["doc"]["document"] for sample in samples]
    scores = []
    for metric in tasks.METRICS:
        ours, theirs = ([float(s[metric]) for s in side] for side in (samples, baseline))
        gain = [a - b for a, b in zip(ours, theirs, strict=True)]
        scores.append(
            Score(
                task=task,
                shots=shots,
                metric=metric,
                value=float(np.mean(ours)),
                error=clustered_error(ours, documents),
                items=len(ours),
                documents=len(set(documents)),
                chance=tasks.CHANCE.get(metric),
                unigram=float(np.mean(theirs)),
                over_unigram=float(np.mean(gain)),
                over_unigram_error=clustered_error(gain, documents),
                truncated=truncated,
            )
        )
    items = [_items(task, shots, name, side, documents) for name, side in (("model", samples), ("unigram", baseline))]
    return scores, pl.concat(items)


def _plain_scores(
    shots: int, results: dict[str, Any], samples: dict[str, Any], truncated: float
) -> tuple[list[Score], pl.DataFrame]:
    """The harness's own values and errors, of a task or of a group of them."""
    scores, items = [], []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            scores.append(
                Score(
                    task=task,
                    shots=shots,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    error=float(error) if isinstance(error, int | float) else None,
                    items=len(samples.get(task, ())),
                    documents=None,
                    chance=None,
                    unigram=None,
                    over_unigram=None,
                    over_unigram_error=None,
                    truncated=truncated,
                )
            )
    for task, of_task in samples.items():
        items.append(_items(task, shots, "model", of_task, [None] * len(of_task)))
    return scores, pl.concat(items or [pl.DataFrame(schema=ITEMS_SCHEMA)])


def _items(
    task: str, shots: int, scorer: str, samples: list[dict[str, Any]], documents: Sequence[str | None]
) -> pl.DataFrame:
    """Long rows of what each question gave."""
    rows: list[tuple[Any, ...]] = []
    for sample, document in zip(samples, documents, strict=True):
        key = (task, shots, int(sample["doc_id"]), document, scorer)
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                rows.append((*key, metric, float(sample[metric]), None))
        for choice, response in enumerate(sample["filtered_resps"]):
            if isinstance(response, str):
                rows.append((*key, "response", None, response))
            elif isinstance(response, tuple | list) and response:
                rows.append((*key, f"log_likelihood/{choice}", float(response[0]), None))
            elif isinstance(response, int | float):
                rows.append((*key, f"log_likelihood/{choice}", float(response), None))
    return pl.DataFrame(rows, schema=ITEMS_SCHEMA, orient="row")
