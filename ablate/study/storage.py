"""Optuna's database: how it is opened, made safe for several workers, and locked by one of them at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

from ablate.study.address import (
    DATABASES,
    DamagedStore,
    alone_with,
    check_address,
    check_file,
    connect_arguments,
    default_storage,
    refusals,
    server_lock,
    set_aside_database,
    sqlite_path,
)

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 90
MAX_RETRIES = 2

optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_storage(url: str) -> RDBStorage:
    """Connect; SQLite gets a write-ahead log and a long busy timeout.

    Raises:
        DamagedStore: the file is damaged, or no database.
        ConfigError: the URL is not one, its driver is missing, or no usable database answers.
    """
    check_address("storage", url, DATABASES)
    # Two processes that make the tables of a fresh database at once end in one of them failing.
    with alone_with("storage", url, "optuna tables"), refusals("storage", url):
        sqlite = sqlite_path(url) is not None
        arguments: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
        if not sqlite:
            arguments["connect_args"] = connect_arguments(url)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = RDBStorage(
                url,
                engine_kwargs=arguments,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
            )
        if sqlite:
            tune_sqlite(storage.engine)
        return storage


def open_or_rebuild(url: str, root: Path, say: Callable[[str], None]) -> None:
    """Make a storage ready before a study runs; the project's own database, where damaged, is set aside and made new.

    What was in it follows from plan and results. Raises ConfigError as `open_storage` does.
    """
    try:
        check_file("storage", url)
        open_storage(url).engine.dispose()
    except DamagedStore:
        if url != default_storage(root):
            raise
        aside = set_aside_database(url)
        say(f"Optuna's database was damaged: it is kept as {aside}, and made new from plan and results")
        open_storage(url).engine.dispose()


def tune_sqlite(engine: sqlalchemy.Engine) -> None:
    """Make SQLite safe for several workers.

    Each transaction takes the write lock at its start: SQLite knows no SELECT FOR UPDATE, so that otherwise two workers
    can both read WAITING and both claim the trial (seen with 2 workers and Optuna 5.0). The write-ahead log with NORMAL
    survives any killed process and spares an fsync a commit.
    """

    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None  # Or the driver would begin transactions of its own, later.
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    def begun(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", connected)
    sqlalchemy.event.listen(engine, "begin", begun)
    engine.dispose()


@contextmanager
def exclusive(storage: RDBStorage, name: str, folder: Path) -> Iterator[None]:
    """Let one process at a time decide what a search does next.

    Args:
        storage: the database that all workers share.
        name: of the study.
        folder: for the lock of a local database; PostgreSQL and MySQL have locks of their own, which end with their
            connection.
    """
    if storage.engine.dialect.name == "sqlite":
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.search.lock"):
            yield
        return
    with server_lock(storage.engine, name):
        yield
