"""Mutated study files and data files: exit code 0 or 2, one line, no traceback, nothing outside the project."""

from __future__ import annotations

import gzip
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import yaml

from ablate.cli.commands import run
from ablate.config import ConfigError, load_study
from ablate.data import codec
from ablate.study.designs import expand
from ablate.study.records import plan_document

SHIPPED = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
LOCAL = """\
title: a tiny study
notes: |
  two lines
base:
  corpus: {source: files, path: texts, tokenizer: bytes, validation_share: 0.3, max_documents: 200}
  model: {d_model: 32, blocks: 1, heads: 2, context: 64}
  tree: &tree {trees: 2, depth: 3, leaf_width: 2}
  train: {steps: 2, batch_size: 8, eval_every: 10, eval_tokens: 8192, lr: 3.0e-3}
"""
STUDIES = [
    LOCAL
    + "seeds: [0, 1]\nfactors: {tree.mirror: [0, 0.5, 1], train.lr: [1e-3, 3e-3]}\narms:\n  other: {tree.depth: 4}\n",
    LOCAL + "design: one_at_a_time\nfactors:\n  tree.init: [uniform, zero_bias]\n  tree.routing: [sign, centred]\n",
    LOCAL + "design: confirm\narms: {a: {tree.mirror: 1}, b: {tree.depth: 2}}\ncontrols: [active]\n"
    "contrasts:\n- {arm: a, endpoint: bpb, claim: lower, margin: 0.01}\n",
    LOCAL + "design: search\nbudget: {trials: 9}\nfinalists: {count: 0}\nsampler: tpe\nfactors:\n"
    "  train.lr: {range: {low: 1e-4, high: 1e-2, log: true}}\n  tree.mirror: {levels: [0, 1], when: {tree.depth: 3}}\n"
    "  tree.depth: [2, 3]\n",
    *(path.read_text(encoding="utf-8") for path in SHIPPED),
]
PIECES = [
    "&a ", "*a", "*tree", "<<: *tree", "!!python/object:os.system ", "!!binary x", "!!int x", "!!set {a}", "--- ", "...",
    ".inf", "-.inf", ".nan", "1e999", "9" * 40, "-1", "0", "1_000", "0x1F", "0o17", "1:30", "2024-13-45", "2024-01-01",
    "true", "no", "null", "~", "''", '""', '"\\ud83d"', '"\\0"', "[", "]", "{", "}", "? ", ": ", "|", ">", "#", "%", "@",
    "`", "\t", "\r", "\u2028", "\ufeff", "\x07", "é", "🌳", "'", '"', "[[[[[[[[", "- - - -", "../../x", "/dev/zero", "a b",
    "[x]", "x" * 300, "tree.depth: 3", "name: compare", "seeds: [1, 1]", "budget: {trials: 1}", "match: total_units",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 10**30, -(10**30), float("inf"), float("nan"), 1e-320, "", "x", "1", "1e-3", "..",
    [], [0], [[0]], {}, {"a": 1}, {"range": {"low": 0, "high": 1}}, "2024-01-01", "\u202e", "a\nb", [1, 1.0], ["a", "a"],
]  # fmt: skip


def mutated_text(text: str, rng: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines)) if lines else 0
        lines[at : at + 1] = rng.choice(
            [
                [],
                [lines[at]] * 2 if lines else [],
                ["  " + lines[at]] if lines else [],
                [lines[at].lstrip()] if lines else [],
                [_with_piece(lines[at], rng)] if lines else [rng.choice(PIECES)],
                [rng.choice(PIECES) + "\n", *lines[at : at + 1]],
                [rng.choice(lines), *lines[at : at + 1]] if lines else [],
            ]
        )
    content = "".join(lines).encode()
    whole: list[Callable[[bytes], bytes]] = [
        lambda b: b, lambda b: b, lambda b: b, lambda b: b, lambda b: b,
        lambda b: b[: rng.randint(0, len(b))], lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n"),
        lambda b: b.decode().encode("utf-16"), lambda b: b.decode().encode("latin-1", "replace") + b"\xe9",
    ]  # fmt: skip
    return rng.choice(whole)(content)


def _with_piece(line: str, rng: random.Random) -> str:
    start = rng.randint(0, len(line))
    return line[:start] + rng.choice(PIECES) + line[min(len(line), start + rng.randint(0, 6)) :]


def mutated_value(text: str, rng: random.Random) -> bytes:
    """A study with one of its values, at any depth, replaced, added or taken away."""
    data = yaml.safe_load(text)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(data)
    for _ in range(rng.randint(1, 2)):
        node, key = rng.choice(places)
        if isinstance(node, dict) and rng.random() < 0.25:
            node.pop(key, None)
        elif isinstance(node, dict) and rng.random() < 0.2:
            node[rng.choice(["x", "", "tree.depth", "[x]", "a/../b"])] = rng.choice(VALUES)
        elif isinstance(node, dict) or key < len(node):
            node[key] = rng.choice(VALUES)
    return yaml.safe_dump(data, allow_unicode=True).encode()


def command(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command in this process; its exit code and what it said on stderr."""
    before, sys.argv = sys.argv, ["ablate", *argv]
    try:
        with pytest.raises(SystemExit) as ended:
            run()
    finally:
        sys.argv = before
    return int(ended.value.code or 0), capsys.readouterr().err


def good(said: str, code: int) -> bool:
    lines = said.splitlines()
    return code == 0 or (code == 2 and len(lines) == 1 and lines[0].startswith("ablate: ") and lines[0].isprintable())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project to work in; afterwards nothing lies beside it, and nothing in the user's home."""
    folder, home = tmp_path / "project", tmp_path / "home"
    (folder / "texts").mkdir(parents=True)
    (folder / "studies").mkdir()
    home.mkdir()
    for i in range(30):
        (folder / "texts" / f"{i}.txt").write_text(f"the tree {i} and its leaves {i * i}", encoding="utf-8")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(folder)
    yield folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "project"]
    assert list(home.iterdir()) == []


def study_files(project: Path, count: int, seed: int, capsys: pytest.CaptureFixture[str]) -> int:
    """Try mutated study files; how many of them were good."""
    rng, fine = random.Random(seed), 0
    file = project / "studies" / "s.yaml"
    for number in range(count):
        text = rng.choice(STUDIES)
        content = rng.choice([mutated_text, mutated_value])(text, rng)
        file.write_bytes(content)
        began = time.process_time()
        told, local = "", True
        try:
            study = load_study(file)
            local = study.trial({}).corpus.source == "files"  # any other takes long to read
            json.dumps(plan_document(expand(study)), allow_nan=False).encode()
            fine += 1
        except ConfigError as error:
            told = str(error)
        except Exception as error:
            raise AssertionError(f"study {number} of seed {seed}: {content!r}") from error
        assert "\n" not in told, (number, content)
        assert len(told) < 1000, (number, content)
        assert time.process_time() - began < 20, (number, content)
        if local and number % 4 == 0:
            code, said = command("prepare", str(file), capsys=capsys)
            assert good(said, code), (number, content, said)
    return fine


TEXTS = [f"document {i}: the tree has {i * i} leaves, größer → 🌳" for i in range(40)]


def data_files(folder: Path) -> dict[str, bytes]:
    rows = "".join(json.dumps({"text": t, "n": [i]}) + "\n" for i, t in enumerate(TEXTS)).encode()
    tables = {
        "a.parquet": pa.table({"n": range(40), "text": TEXTS}),
        "b.parquet": pa.table({"text": pa.array([*TEXTS, None]).dictionary_encode()}),
    }
    found = {
        "a.txt": "\n\n".join(TEXTS).encode(),
        "long.md": ("\n\n".join(TEXTS) * 200).encode(),
        "a.jsonl": rows,
        "b.jsonl.gz": gzip.compress(rows, mtime=0),
        "c.txt.GZ": gzip.compress(TEXTS[0].encode(), mtime=0),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / name, row_group_size=15)
        found[name] = (folder / name).read_bytes()
        (folder / name).unlink()
    found["tokenizer.json"] = codec.train(iter([TEXTS]), 300).content().encode()
    return found


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(1, 2)):
        at = rng.randint(0, max(0, len(data) - 1))
        change = rng.randrange(6)
        if change == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            del data[at : at + rng.randint(1, 40)]
        elif change == 2:
            data[at:at] = rng.choice(
                [b"\0", b"\xff", b"\xc3", b"\n", b"\r", b'"', b"{", b"[" * 2000, b"9" * 5000, b"\xed\xa0\x80"]
            )
        elif change == 3:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        elif change == 4 and rng.random() < 0.5:
            del data[at:]
        else:
            data[at : at + 4] = rng.randbytes(4)
    return bytes(data)


def data_runs(project: Path, count: int, seed: int, capsys: pytest.CaptureFixture[str]) -> int:
    """Prepare corpora with one mutated file among them, and tokenizers; how many were good."""
    rng, fine = random.Random(seed), 0
    known = data_files(project)
    study = project / "studies" / "s.yaml"
    for number in range(count):
        name = rng.choice(list(known))
        inside = name.lower().endswith(".gz") and rng.random() < 0.5
        content = mutated_bytes(gzip.decompress(known[name]) if inside else known[name], rng)
        content = gzip.compress(content, mtime=0) if inside else content
        place = project / name if name == "tokenizer.json" else project / "texts" / name
        place.write_bytes(content)
        tokenizer = (
            "tokenizer: file, tokenizer_file: tokenizer.json" if name == "tokenizer.json" else "tokenizer: bytes"
        )
        study.write_text(
            LOCAL.replace("tokenizer: bytes", tokenizer) + "factors: {tree.mirror: [0]}\n", encoding="utf-8"
        )
        began = time.process_time()
        code, said = command("prepare", str(study), "--json", capsys=capsys)
        assert good(said, code), (number, seed, name, said)
        assert time.process_time() - began < 20, (number, seed, name)
        fine += code == 0
        place.unlink()
    return fine


def test_two_hundred_mutated_study_files(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine = study_files(project, 200, 1, capsys)
    assert 15 < fine < 185, "both ends are tried"


def test_fifty_mutated_data_files(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine = data_runs(project, 50, 2, capsys)
    assert 1 < fine < 49, "both ends are tried"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_thousand_mutated_study_files(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study_files(project, 2000, 3, capsys)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_five_hundred_mutated_data_files(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_runs(project, 500, 4, capsys)
