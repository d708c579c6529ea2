"""Files that the product wrote and a disk or a hand damaged: each is named, none is read as if it were whole, all are mended."""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from ablate.config import ConfigError
from ablate.results.collect import collect
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.results.record import load_record, read_record
from ablate.study.address import default_storage
from ablate.study.outcome import Outcome
from ablate.study.runner import run_study
from ablate.study.status import status
from ablate.tracking import tags
from ablate.tracking.doctor import doctor
from ablate.tracking.store import default_uri, prepare_store
from ablate.tracking.tracker import MlflowTracker
from ablate.training.runs import find_checkpoint, find_usage
from tests.study import objective
from tests.study.test_runner import table

STUDY = objective.study(seeds=[0])
ALL = Outcome(4, 4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, fresh_store: Path) -> Path:
    """A finished and tracked study."""
    root = tmp_path_factory.mktemp("whole") / "project"
    (root / "state").mkdir(parents=True)
    shutil.copyfile(fresh_store, root / "state" / "mlflow.db")
    assert run(root) == ALL
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, which may be damaged."""
    for part in ("results", "state"):
        shutil.copytree(whole / part, tmp_path / part)
    return tmp_path


def run(root: Path) -> Outcome:
    return run_study(STUDY, root, run=objective.descend, tracker=MlflowTracker(default_uri(root)))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=1))


def flip(path: Path) -> None:
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def renamed(path: Path) -> None:
    shutil.copyfile(path, path.with_name("aaaaaaaaaaaa.json"))


def record_edited(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit(path, **changes)


def last_bpb(value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        history = json.loads(path.read_text())["history"]
        edit(path, history=[*history[:-1], {**history[-1], "bpb": value}])

    return change


RECORDS: dict[str, Callable[[Path], Any]] = {
    "cut": cut,
    "empty": lambda path: path.write_text(""),
    "a bit": flip,
    "no history": record_edited(history=[]),
    "a word for bpb": last_bpb("x"),
    "a better bpb": last_bpb(-5.0),
    "a list": lambda path: path.write_text("[1]"),
    "too deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_damaged_record_is_refused_by_every_command_alike(root: Path, damage: str) -> None:
    layout = Layout(root, "cheap")
    name = min(layout.done())
    RECORDS[damage](layout.record(name))
    readers: list[Callable[[], Any]] = [
        lambda: load_record(layout.record(name)),
        lambda: read_record(layout.record(name)),
        lambda: status("cheap", root),
        lambda: collect("cheap", root),
        lambda: find_checkpoint(name, root),
    ]
    for read in readers:
        with pytest.raises(ConfigError) as error:
            read()
        assert "\n" not in str(error.value)
    assert f"damaged result {name}.json" in [f.problem for f in doctor(root)]
    assert all(f.fixed for f in doctor(root, fix=True))
    assert layout.done() == {t for t in layout.done() if t != name}
    assert status("cheap", root).done == 3
    assert (root / "state/damaged/cheap" / f"{name}.json").exists()


def test_a_record_under_another_trials_name_is_refused(root: Path) -> None:
    layout = Layout(root, "cheap")
    renamed(layout.record(min(layout.done())))
    with pytest.raises(ConfigError, match="it is trial"):
        status("cheap", root)
    assert [f.problem for f in doctor(root, fix=True)] == ["damaged result aaaaaaaaaaaa.json"]
    assert run(root) == ALL


def test_status_shows_what_the_records_hold_now(root: Path) -> None:
    layout = Layout(root, "cheap")
    before = str(status("cheap", root).best)
    for name in layout.done():  # of a version that knew no seals, as a study that was deleted and run again
        record = load_record(layout.record(name))
        last = record.history[-1].model_copy(update={"bpb": 9.5})
        changed = record.model_copy(update={"history": [*record.history[:-1], last]})
        layout.record(name).write_text(changed.model_dump_json())
    after = str(status("cheap", root).best)
    assert "9.5" in after
    assert after != before
    (root / "state/index/cheap.jsonl").write_bytes(b'{"trial": 1}\nnonsense\n\xff\n[]\n')
    assert str(status("cheap", root).best) == after


def test_damaged_tables_are_named_and_their_trials_run_again(root: Path, whole: Path) -> None:
    layout = Layout(root, "cheap")
    first, second, third, fourth = sorted(layout.done())
    flip(layout.usage(first))
    layout.usage(second).unlink()
    cut(layout.usage(third))
    layout.record(fourth).write_text(layout.record(fourth).read_text().replace('"seed": 0', '"seed": 1', 1))
    with pytest.raises(ConfigError, match="damaged"):
        collect("cheap", root)
    with pytest.raises(ConfigError, match="has no usage table"):
        find_usage(second, root)
    assert [f.problem for f in doctor(root)] == [
        f"damaged file {first}.usage.parquet",
        f"missing file {second}.usage.parquet",
        f"damaged file {third}.usage.parquet",
        f"damaged result {fourth}.json",
    ]
    assert run(root) == ALL
    assert table(root) == table(whole)
    assert [f for f in doctor(root, fix=True) if not f.fixed] == []
    assert doctor(root) == []


def test_records_of_earlier_versions_name_no_digests_and_are_whole(root: Path) -> None:
    layout = Layout(root, "cheap")
    for name in layout.done():
        old = load_record(layout.record(name)).model_dump(exclude={"digests"})
        layout.record(name).write_text(json.dumps(old))
    assert doctor(root) == []
    assert status("cheap", root).done == 4
    collect("cheap", root)
    layout.usage(min(layout.done())).write_bytes(b"")
    assert [f.problem for f in doctor(root)] == [f"damaged file {min(layout.done())}.usage.parquet"]


PLANS = {"empty object": "{}", "no trials": '{"trials": null}', "cut": '{"study": "che', "a list": "[]", "empty": ""}


@pytest.mark.parametrize("damage", PLANS)
def test_a_damaged_plan_stops_nobody_else(root: Path, damage: str) -> None:
    shutil.copytree(root / "results/cheap", root / "results/other")
    (root / "results/cheap/plan.json").write_text(PLANS[damage])
    for read in (
        lambda: load_plan(Layout(root, "cheap")),
        lambda: status("cheap", root),
        lambda: collect("cheap", root),
    ):
        with pytest.raises(ConfigError, match="is damaged"):
            read()
    flip(Layout(root, "other").usage(min(Layout(root, "other").done())))
    found = doctor(root, fix=True)
    assert {f.study for f in found} == {"cheap", "other"}
    assert "damaged plan plan.json" in [f.problem for f in found]
    assert run(root) == ALL
    assert status("cheap", root).done == 4


def test_a_bit_of_a_plan_does_not_turn_unseen(root: Path) -> None:
    path = Layout(root, "cheap").plan
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7', 1))
    with pytest.raises(ConfigError, match="its content is not what was written"):
        load_plan(Layout(root, "cheap"))


SPOOLS = ["{}", "[]", "1", '{"event": 5}', '{"event": "metrics"}', '{"event": "close"}', '{"event": "open"}', "\udcff"]


def test_spool_lines_that_are_no_events_are_left_out(root: Path) -> None:
    layout = Layout(root, "cheap")
    names = [*sorted(layout.done()), *(f"{i:012x}" for i in range(len(SPOOLS)))]
    for name, line in zip(names, itertools.cycle(SPOOLS), strict=False):
        path = root / "state/spool/cheap" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(line.encode(errors="surrogateescape") + b"\n")
    assert all(f.fixed for f in doctor(root, fix=True))
    assert doctor(root) == []
    assert run(root) == ALL


def inverted(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 4, len(content) // 4 + 15_000)
    content[middle] = bytes(b ^ 0xFF for b in content[middle])
    path.write_bytes(content)


DATABASES: dict[str, Callable[[Path], Any]] = {
    "cut": cut,
    "text": lambda path: path.write_bytes(b"these are no pages of a database " * 400),
    "inverted": inverted,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


def damage_database(path: Path, damage: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    DATABASES[damage](path)


@pytest.mark.parametrize("damage", DATABASES)
def test_a_damaged_optuna_database_is_made_new_from_plan_and_results(root: Path, whole: Path, damage: str) -> None:
    damage_database(root / "state" / "optuna.db", damage)
    assert status("cheap", root).done == 4
    for finding in doctor(root):
        assert "is damaged" in finding.problem
    assert run(root) == ALL
    assert table(root) == table(whole)
    assert doctor(root) == []
    assert default_storage(root).endswith("state/optuna.db")


@pytest.mark.parametrize("damage", DATABASES)
def test_a_damaged_mlflow_database_gets_finished_trials_again(root: Path, damage: str) -> None:
    damage_database(root / "state" / "mlflow.db", damage)
    assert all("is damaged" in f.problem for f in doctor(root))
    assert run(root) == ALL
    assert doctor(root) == []
    client = MlflowClient(default_uri(root))
    experiment = client.get_experiment_by_name("cheap")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`{tags.ROLE}` = 'trial'")
    assert {r.data.tags[tags.TRIAL] for r in runs} == Layout(root, "cheap").done()


def test_an_older_mlflow_database_is_migrated_and_a_newer_one_refused(tmp_path: Path) -> None:
    code = """
import sys
from alembic import command
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base

engine = utils.create_sqlalchemy_engine(sys.argv[1])
Base.metadata.create_all(engine)
with engine.begin() as connection:
    config = utils._get_alembic_config(sys.argv[1])
    config.attributes["connection"] = connection
    command.upgrade(config, "7f2a7d5fae7d")  # of MLflow 2.6
"""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    subprocess.run([sys.executable, "-c", code, uri], check=True, capture_output=True)
    assert prepare_store(uri).search_experiments() is not None
    shutil.copyfile(tmp_path / "mlflow.db", tmp_path / "newer.db")  # MLflow looks at a database once a process
    with closing(sqlite3.connect(tmp_path / "newer.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(ConfigError, match="newer"):
        prepare_store(f"sqlite:///{tmp_path / 'newer.db'}")
