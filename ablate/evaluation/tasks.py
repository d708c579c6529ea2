"""Question answering without a network: tasks made of a corpus's held-out documents, as harness YAML over JSON.

`heldout_continuation`: which of four passages of equal length goes on? `heldout_cloze`: which of four words ends the
passage, which holds the true one already (as most of LAMBADA's do, arXiv 1606.06031)? The three wrong choices are right
ones of questions from other documents: what is likely, or short, without its context gains nothing, and a model that
knows nothing is at chance. `greedy` counts the true choice among all texts instead, as LAMBADA does.

Nothing here depends on a tokenizer or a random state: one corpus gives one set of questions, for every model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ablate.config import ConfigError
from ablate.data.tokens import Prepared
from ablate.files import write_text

CONTINUATION = "heldout_continuation"
CLOZE = "heldout_cloze"
OFFLINE = (CONTINUATION, CLOZE)
CHOICES = 4
METRICS = ("acc", "acc_mutual_info", "greedy", "bits")
CHANCE = {"acc": 1 / CHOICES, "acc_mutual_info": 1 / CHOICES}

CONTEXT_CHARACTERS = 160
CONTINUATION_CHARACTERS = 48
PER_DOCUMENT = 24
"""Questions from one document at most, so that a long one does not become the task."""
QUESTIONS = 600
SHOT_DOCUMENTS = 5
"""One document in so many gives examples for few-shot prompts, and no question."""
TIE = 1e-4
"""Nats within which two log-likelihoods are the same: what differs less is arithmetic."""

FORMAT = 1
"""Raised when the same corpus would give other questions."""

_WORD = re.compile(r"[^\W\d]{4,}")
_LAST_WORD = re.compile(r"(?<=\S) ([^\W\d]{4,})\b")


@dataclass(frozen=True)
class Passage:
    """A place in a document: the text before it, and what follows."""

    document: str
    context: str
    end: str


def write_tasks(prepared: Prepared, folder: Path) -> Path:
    """Write `<task>.yaml`, `<task>.jsonl` and `<task>.shots.jsonl` for each task; returns the folder they are in.

    It is a folder of its own under `folder` for each corpus and format. Raises ConfigError where the held-out documents
    are too few.
    """
    out = folder.resolve() / f"{prepared.data_hash}-{FORMAT}"
    out.mkdir(parents=True, exist_ok=True)
    held_out = pl.concat([prepared.held_out("validation"), prepared.held_out("test")])
    documents = list(held_out.select("id", "text").iter_rows())
    documents.sort(key=lambda d: _key("document", d[0]))
    shots, asked = documents[::SHOT_DOCUMENTS], [d for i, d in enumerate(documents) if i % SHOT_DOCUMENTS]
    makers = {CONTINUATION: continuation_questions, CLOZE: cloze_questions}
    for task, make in makers.items():
        questions, examples = make(asked), make(shots)
        if len(questions) < 2 or not examples:
            raise ConfigError(
                f"task {task!r} cannot be made: the corpus has {len(documents)} held-out document(s), too few or too "
                "short; raise corpus.validation_share or give it more documents"
            )
        _write_lines(out / f"{task}.jsonl", questions)
        _write_lines(out / f"{task}.shots.jsonl", examples)
        write_text(out / f"{task}.yaml", _definition(task, out))
    return out


def continuation_questions(documents: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Questions with `context`, `choices` (of equal length in characters), `answer`, `document`, from (id, text)."""
    return _questions(_thinned([list(_cuts(document, text)) for document, text in documents]))


def cloze_questions(documents: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Questions as above; a choice is a space and a word."""
    return _questions(_thinned([list(_last_words(document, text)) for document, text in documents]))


def _questions(passages: Sequence[Passage]) -> list[dict[str, Any]]:
    """Each passage with the ends of passages from three other documents, all four different."""
    keys = [int.from_bytes(_key(p.document, p.context, p.end)[:8]) for p in passages]
    questions = []
    for number, passage in enumerate(passages):
        name = f"{passage.document}/{number}"
        wrong: list[str] = []
        others = [i for i, p in enumerate(passages) if p.document != passage.document]
        # In an order of its own for each question: frequent ends come as often among the wrong as among the right.
        # Those that start with the same blank come first: a line break or a space is no clue.
        mask = int.from_bytes(_key(name)[:8])
        for i in sorted(others, key=lambda i: (passages[i].end[0] != passage.end[0], keys[i] ^ mask)):
            if passages[i].end != passage.end and passages[i].end not in wrong:
                wrong.append(passages[i].end)
            if len(wrong) == CHOICES - 1:
                questions.append(_question(name, passage, wrong))
                break
    return questions


def score(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The harness's `process_results`; the second half of the results are the choices without the context.

    `acc` by log-likelihood and `acc_mutual_info` by what the context adds to it (which leaves out how likely a choice
    is by itself), each with ties shared: 1/n among n best; `greedy`; `bits`, of the truth a byte. Raises ValueError
    where the model gave no number.
    """
    totals, answer = [total for total, _ in results], doc["answer"]
    if any(math.isnan(total) for total in totals):
        raise ValueError(f"the model's log-likelihoods are {totals}: not numbers")
    given, alone = totals[:CHOICES], totals[CHOICES:]
    return {
        "acc": _credit(given, answer),
        "acc_mutual_info": _credit([a - b for a, b in zip(given, alone, strict=True)], answer),
        "greedy": float(results[answer][1]),
        "bits": -given[answer] / math.log(2) / len(doc["choices"][answer].encode()),
    }


def _credit(values: Sequence[float], answer: int) -> float:
    """1 if the answer's value is the highest, shared with those as high."""
    best = max(values)
    tied = [i for i, value in enumerate(values) if value == best or best - value <= TIE]
    return 1 / len(tied) if answer in tied else 0.0


def _cuts(document: str, text: str) -> Iterator[Passage]:
    """Passages that do not overlap; each continuation starts with the blank after a word."""
    at, need = CONTEXT_CHARACTERS, CONTINUATION_CHARACTERS
    while at + need <= len(text):
        if text[at].isspace() and not text[at - 1].isspace():
            end = text[at : at + need]
            if len(end.split()) > 2:
                yield Passage(document, _context(text, at), end)
                at += CONTEXT_CHARACTERS + need
                continue
        at += 1


def _last_words(document: str, text: str) -> Iterator[Passage]:
    """Passages that end before a word they hold already; they do not overlap."""
    free = 0
    for match in _LAST_WORD.finditer(text):
        at = match.start()
        if at < free or at < CONTEXT_CHARACTERS:
            continue
        context = _context(text, at)
        if match[1] in _WORD.findall(context):
            yield Passage(document, context, match[0])
            free = match.end() + CONTEXT_CHARACTERS


def _context(text: str, at: int) -> str:
    """The characters before a place, from the start of a word on."""
    start = at - CONTEXT_CHARACTERS
    while start > 0 and start < at - 1 and not text[start - 1].isspace():
        start += 1
    return text[start:at].lstrip()


def _thinned(passages: Sequence[list[Passage]]) -> list[Passage]:
    """At most PER_DOCUMENT of each document, evenly spread over it, and about QUESTIONS in all."""
    cap = PER_DOCUMENT
    while cap > 1 and sum(min(cap, len(p)) for p in passages) > QUESTIONS:
        cap -= 1
    kept = []
    for of_document in passages:
        count = min(cap, len(of_document))
        kept += [of_document[i * len(of_document) // count] for i in range(count)]
    return kept[:QUESTIONS]


def _question(name: str, passage: Passage, wrong: Sequence[str]) -> dict[str, Any]:
    choices = sorted([passage.end, *wrong], key=lambda choice: _key(name, "order", choice))
    return {
        "document": passage.document,
        "context": passage.context,
        "choices": choices,
        "answer": choices.index(passage.end),
    }


def _key(*parts: str) -> bytes:
    """A place in an order that depends on the text only."""
    return hashlib.sha256("\0".join(parts).encode()).digest()


class _Function(str):
    """A name that YAML marks as the harness's `!function`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _definition(task: str, folder: Path) -> str:
    # The harness asks for the choices without a context where it finds `acc_mutual_info`.
    metrics = [(metric, metric != "bits") for metric in METRICS]
    return yaml.dump(
        {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / f"{task}.jsonl"), "shots": str(folder / f"{task}.shots.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "fewshot_split": "shots",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "fewshot_delimiter": "\n\n",
            "process_results": _Function("ablate.evaluation.tasks.score"),
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": up} for m, up in metrics],
            "metadata": {"version": FORMAT},
        },
        Dumper=_Dumper,
        sort_keys=False,
    )


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
