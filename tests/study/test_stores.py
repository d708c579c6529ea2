"""Stores that cannot be used: one line that says what to do, within seconds, without a secret, from every command alike."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from ablate.config import ConfigError, masked
from ablate.results.layout import Layout
from ablate.study.address import DATABASES, DamagedStore, check_address, default_storage
from ablate.study.checkout import checkout_id
from ablate.study.designs import expand
from ablate.study.outcome import Outcome
from ablate.study.runner import run_study
from ablate.study.storage import open_storage
from ablate.tracking import tags
from ablate.tracking.doctor import doctor
from ablate.tracking.store import prepare_store
from ablate.tracking.tracker import MlflowTracker
from tests.study import objective
from tests.study.postgres import postgres

SECRET = "hunter2"
MOST_SECONDS = 15


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://user:p@hunter2:w0rd@db.example/ab", "percent code"),
        ("postgresql://user:hunter2 x@db.example/ab", "percent code"),
        ("postgresql+psycopg://user:hunter2@127.0.0.1:9/ab", "no database answers there"),
        ("postgresql+nosuch://user:hunter2@127.0.0.1:9/ab", "driver is unknown"),
        ("mysql+pymysql://user:hunter2@127.0.0.1:9/ab", "driver is not installed"),
        ("postgresql://user:hunter2@127.0.0.1:port/ab", "cannot be read as an address"),
        ("redis://:hunter2@127.0.0.1/0", "begins with one of"),
        ("postgres-ql//u:hunter2@h", "begins with one of"),
        ("sqlite", "begins with one of"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file::memory:?cache=shared&uri=true", "in memory"),
    ],
)
def test_an_unusable_storage_is_one_line_without_its_password(url: str, words: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=words) as error:
        run_study(objective.study(), tmp_path, run=objective.descend, storage=url)
    assert time.monotonic() - began < MOST_SECONDS
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)
    assert not Layout(tmp_path, "cheap").done()


def test_a_database_of_another_optuna_says_what_to_do(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    open_storage(url).engine.dispose()
    for version, words in (("v3.0.0.d", "optuna storage upgrade"), ("v99.0.0.a", "newer version")):
        with closing(sqlite3.connect(tmp_path / "a.db")) as connection, connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
        with pytest.raises(ConfigError, match=words):
            open_storage(url)
    (tmp_path / "text.db").write_text("no database, and long enough to be looked at " * 50)
    with pytest.raises(DamagedStore, match="move the file away"):
        open_storage(f"sqlite:///{tmp_path / 'text.db'}")


@pytest.fixture
def silent() -> Iterator[int]:
    """A port of a server that accepts connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for one in held:
            one.close()


@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg"])
def test_a_store_that_never_answers_is_refused_in_seconds(scheme: str, silent: int) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="no MLflow answers there") as error:
        prepare_store(f"{scheme}://mlf:{SECRET}@127.0.0.1:{silent}/db")
    assert time.monotonic() - began < MOST_SECONDS
    assert SECRET not in str(error.value)


COMMANDS = [["study", "status", "cheap"], ["doctor"], ["ui"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[-1])
def test_every_command_says_it_alike(command: list[str], tmp_path: Path) -> None:
    url = f"postgresql+psycopg://u:{SECRET}@127.0.0.1:9/x"
    assert run_study(objective.study(seeds=[0]), tmp_path, run=objective.descend) == Outcome(4, 4)
    Layout(tmp_path, "cheap").record(expand(objective.study(seeds=[0])).trials[0].hash).unlink()
    done = subprocess.run(
        [sys.executable, "-c", "from ablate.cli import main; main()", *command],
        cwd=tmp_path,
        env={
            **os.environ,
            "OPTUNA_STORAGE": url,
            "MLFLOW_TRACKING_URI": url,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert SECRET not in done.stdout + done.stderr
    assert "answers there" in done.stderr


NAMES = st.text(st.characters(categories=["L", "N"], max_codepoint=0x17F), min_size=1, max_size=8)
PASSWORDS = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="'\""), min_size=4, max_size=12
)


@given(user=NAMES, password=PASSWORDS, before=NAMES, scheme=st.sampled_from([*DATABASES[1:], "http", "https"]))
def test_no_password_survives_masking(user: str, password: str, before: str, scheme: str) -> None:
    secret = f"#{password}#"  # so that it is not part of the rest by chance
    shown = masked(f"{before} {scheme}://{user}:{secret}@host.example:5/db?sslmode=on failed")
    assert secret not in shown
    assert shown == f"{before} {scheme}://{user}:***@host.example:5/db?sslmode=on failed"
    with pytest.raises(ConfigError) as error:
        check_address("storage", f"{scheme}://{user}:{secret}@@host.example/db", ["sqlite"])
    assert secret not in str(error.value)


def test_logs_and_tracebacks_are_masked() -> None:
    code = (
        "import logging, warnings; from ablate.config import mask_output; mask_output()\n"
        "url = 'http://u:hunter2@h/x'\n"
        "logging.getLogger('x').warning('away: %s', url); warnings.warn(url)\n"
        "raise RuntimeError(url + '?token=hunter2')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.count("***") >= 4
    assert SECRET not in done.stderr.replace("'http://u:hunter2@h/x'", "")  # the source line of the warning
    code = "import logging, ablate, ablate.config; print(logging.getLogRecordFactory() is logging.LogRecord)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n", "importing ablate changes nothing"


def test_two_studies_at_once_in_a_fresh_project_both_run(tmp_path: Path) -> None:
    code = "import sys; from ablate.study.storage import open_storage; open_storage(sys.argv[1])"
    url = default_storage(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        command = [sys.executable, "-c", code, url]
        done = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True, check=False), range(4)))
    assert [(d.returncode, d.stderr) for d in done] == [(0, "")] * 4


def test_two_checkouts_on_one_server_leave_each_other_alone(tmp_path: Path, fresh_store: Path) -> None:
    shared = tmp_path / "shared.db"
    shared.write_bytes(fresh_store.read_bytes())
    uri, study = f"sqlite:///{shared}", objective.study(seeds=[0], factors={"tree.mirror": [0]})
    roots = [tmp_path / "mine", tmp_path / "yours"]
    for root in roots:
        assert run_study(study, root, run=objective.descend, tracker=MlflowTracker(uri)) == Outcome(1, 1)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("cheap")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=100)
    assert len(found) == 4, "a study's run and a trial's run each"
    names = {checkout_id(root) for root in roots}
    assert {r.data.tags[tags.CHECKOUT] for r in found} == names
    yours = [r for r in found if r.data.tags[tags.CHECKOUT] == checkout_id(roots[1])]
    nobodys = client.create_run(experiment.experiment_id, tags={tags.ROLE: "trial", tags.TRIAL: "a" * 12})
    for run in yours:
        client.update_run(run.info.run_id, status="RUNNING")
    assert doctor(roots[0], fix=True, tracking=uri) == []
    for run in (*yours, nobodys):
        assert client.get_run(run.info.run_id).info.status == "RUNNING"
    assert all(f.fixed for f in doctor(roots[1], fix=True, tracking=uri))
    assert {client.get_run(run.info.run_id).info.status for run in yours} == {"FINISHED"}


def test_a_copy_of_a_checkout_is_another_one_and_a_moved_one_is_the_same(tmp_path: Path) -> None:
    first = checkout_id(tmp_path / "a")
    assert checkout_id(tmp_path / "a") == first
    (tmp_path / "b" / "state").mkdir(parents=True)
    (tmp_path / "b/state/checkout.json").write_bytes((tmp_path / "a/state/checkout.json").read_bytes())
    assert checkout_id(tmp_path / "b") != first
    (tmp_path / "a").rename(tmp_path / "c")
    assert checkout_id(tmp_path / "c") == first


@pytest.mark.postgres
def test_two_checkouts_on_one_postgresql_have_queues_of_their_own(tmp_path: Path) -> None:
    study = objective.study(seeds=[0], factors={"tree.mirror": [0]})
    with postgres(tmp_path) as url:
        for root in (tmp_path / "mine", tmp_path / "yours"):
            assert run_study(study, root, run=objective.descend, storage=url) == Outcome(1, 1)
        names = sorted(s.study_name for s in open_storage(url).get_all_studies())
        assert len(names) == 2
        assert names[1] == f"{names[0]}-{checkout_id(tmp_path / 'yours')}"
