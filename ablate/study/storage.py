"""Optuna's database: how it is opened, made safe for several workers, and locked by one of them at a time."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from ablate.config import ConfigError

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 90
MAX_RETRIES = 2

optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_storage(url: str) -> RDBStorage:
    """Connect; SQLite gets a write-ahead log and a long busy timeout.

    Raises:
        ConfigError: the URL is not one, its driver is missing, or no database answers.
    """
    try:
        backend = make_url(url).get_backend_name()
    except ArgumentError:
        raise ConfigError(
            f"storage is {url!r}: a database URL is expected, sqlite:////path or postgresql://…"
        ) from None
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if backend == "sqlite":
        arguments = {"connect_args": {"timeout": 60}}
        file = make_url(url).database
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = RDBStorage(
                url,
                engine_kwargs=arguments,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
            )
    except (OperationalError, ImportError, StorageInternalError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"storage {make_url(url).render_as_string()!r} cannot be used: {reason}") from None
    if backend == "sqlite":
        tune_sqlite(storage.engine)
    return storage


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
    dialect = storage.engine.dialect.name
    key: int | str
    if dialect == "postgresql":
        take, give = "SELECT pg_advisory_lock(:key)", "SELECT pg_advisory_unlock(:key)"
        key = zlib.crc32(name.encode())
    elif dialect in {"mysql", "mariadb"}:
        take, give = "SELECT GET_LOCK(:key, -1)", "SELECT RELEASE_LOCK(:key)"
        key = f"ablate {name}"[:64]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.search.lock"):
            yield
        return
    with storage.engine.connect() as connection:
        connection.execute(sqlalchemy.text(take), {"key": key})
        try:
            yield
        finally:
            connection.execute(sqlalchemy.text(give), {"key": key})
