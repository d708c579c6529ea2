"""Addresses of stores: where Optuna's and MLflow's databases are, and one line for whatever they answer."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.config import ConfigError, masked, reason

if TYPE_CHECKING:  # slow to import, and seldom needed here
    import sqlalchemy

DATABASES = ("sqlite", "postgresql", "mysql", "mariadb")
"""Kinds of database that Optuna's trials may be kept in."""
CONNECT_SECONDS = 10
"""How long a database or a server may take to answer at first."""
CHECKED_BYTES = 200_000_000
"""Larger database files are not looked through before they are used, which would take long."""
_TIMEOUT_ARGUMENT = {
    "psycopg": "connect_timeout",
    "psycopg2": "connect_timeout",
    "pymysql": "connect_timeout",
    "mysqldb": "connect_timeout",
    "pg8000": "timeout",
    "pymssql": "login_timeout",
    "pyodbc": "timeout",
}
_DAMAGED = ("file is not a database", "malformed", "disk image", "unsupported file format")


class DamagedStore(ConfigError):
    """A database file that is damaged, or none at all."""


def default_storage(root: Path) -> str:
    """Return the URL of the SQLite database under the project's state folder."""
    return sqlite_url(root / "state" / "optuna.db")


def sqlite_url(file: Path) -> str:
    """Return the URL of an SQLite file, whatever its folders are called: in a URL, % and ? have a meaning."""
    path = str(file.resolve())
    coded = path.replace("%", "%25").replace("?", "%3F")
    # MLflow makes the folder of a URL that begins with sqlite:///, and makes it with the percent code for a name.
    return f"sqlite:///{coded}" if coded == path else f"sqlite+pysqlite:///{coded}"


def check_address(key: str, url: str, allowed: Collection[str]) -> None:
    """Raise ConfigError for an address that cannot be one: unknown kind, unencoded password, a database in memory.

    Args:
        key: what the address is of, `storage` or `tracking`; messages begin with it.
        url: the address.
        allowed: kinds of database, and `http` and `https` for a server.
    """
    head, mark, rest = url.partition("://")
    kind = head.partition("+")[0]
    names = ", ".join(f"{name}://…" for name in allowed if name != "https")
    if not mark or kind not in allowed:
        raise ConfigError(f"{key} is {masked(url)!r}: an address is expected that begins with one of {names}")
    if kind == "sqlite":
        database = rest.partition("?")[0].removeprefix("/")
        if database in {"", ":memory:"} or ":memory:" in rest or "mode=memory" in rest:
            raise ConfigError(
                f"{key} is {url!r}: a database in memory cannot be shared by processes; a file is expected, "
                f"sqlite:////absolute/path.db"
            )
        return
    if any(character.isspace() or character in "'\"" for character in url) or rest.partition("?")[0].count("@") > 1:
        shown = f"{head}://***@{rest.rpartition('@')[2]}" if "@" in rest else url
        raise ConfigError(
            f"{key} is {shown!r}: special characters of a name or password are written in percent code there, "
            f"@ as %40, : as %3A, / as %2F, a blank as %20"
        )
    with refusals(key, url):
        from urllib.parse import urlsplit

        if not urlsplit(url).hostname and kind in {"http", "https"}:
            raise ConfigError(f"{key} is {masked(url)!r}: it names no server; {kind}://host:port is expected")
        _ = urlsplit(url).port


def sqlite_path(url: str) -> Path | None:
    """Return the file of an SQLite address, None for any other."""
    if not url.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    return Path(make_url(url).database or "")


def check_file(key: str, url: str) -> None:
    """Raise DamagedStore where the file of an SQLite address is there and not whole; large ones are not read."""
    file = sqlite_path(url) if "://" in url else None
    if file is None or not file.is_file() or not 0 < file.stat().st_size < CHECKED_BYTES:
        return
    with refusals(key, url), closing(sqlite3.connect(file, timeout=60)) as connection:
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found[0] != "ok":
            raise sqlite3.DatabaseError(f"database disk image is malformed: {found[0]}")


def set_aside_database(url: str) -> Path:
    """Move the file of an SQLite address, with its log, to the folder `damaged` beside it; returns its new path."""
    file = sqlite_path(url)
    assert file is not None
    folder = file.parent / "damaged"
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (aside := folder / f"{file.name}.{number}").exists():
        number += 1
    for end in ("", "-wal", "-shm", "-journal"):
        part = file.with_name(file.name + end)
        if part.exists():
            part.replace(aside.with_name(aside.name + end))
    return aside


@contextmanager
def refusals(key: str, url: str) -> Iterator[None]:
    """Turn every error of a database, a server or a driver into a ConfigError of one line that says what to do.

    Raises:
        DamagedStore: the file is damaged, or no database.
        ConfigError: for everything else.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # drivers raise whatever they like
        text = masked(reason(error))[:300]
        if not any(words in str(error) for words in _DAMAGED):
            raise ConfigError(f"{key} is {masked(url)!r}: {_advice(key, error, text)}") from None
        raise DamagedStore(
            f"{key} is {masked(url)!r}: the database cannot be used, it is damaged or none ({text}); move the file away "
            f"or give another address"
        ) from None


def _advice(key: str, error: Exception, text: str) -> str:
    """Return what is wrong with a store and what to do about it."""
    whole = str(error)
    if isinstance(error, ImportError):
        return (
            f"its driver is not installed ({text}); install it, or name one that is, such as postgresql+psycopg:// "
            f"after pip install 'psycopg[binary]'"
        )
    if "storage upgrade" in whole:
        return "its tables were made by an older Optuna; back it up and run `optuna storage upgrade --storage` with it"
    if "pip install -U optuna" in whole or "locate revision" in whole:
        return "its tables were made by a newer version; update the libraries, or give another address"
    if "Could not parse" in whole or "invalid literal" in whole or "Port could not be cast" in whole:
        # The text may hold a part of the password.
        return "it cannot be read as an address; user:password@host:port/name is expected after ://, in percent code"
    if "load plugin" in whole:
        return f"its driver is unknown ({text}); postgresql+psycopg:// and mysql+pymysql:// are two that are known"
    who = "MLflow" if key == "tracking" else "database"
    return f"no {who} answers there ({text}); start it, or correct the address"


def connect_arguments(url: str) -> dict[str, Any]:
    """Return what a database's driver is given so that an unreachable server costs seconds, not minutes."""
    from sqlalchemy.engine import make_url

    argument = _TIMEOUT_ARGUMENT.get(make_url(url).get_dialect().driver)
    return {argument: CONNECT_SECONDS} if argument else {}


@contextmanager
def alone_with(key: str, url: str, name: str) -> Iterator[None]:
    """Let one process at a time make or change the tables of a database; a server that is down is refused in seconds.

    Args:
        key: as in `check_address`.
        url: a database's address, checked before.
        name: of the lock; PostgreSQL and MySQL have locks of their own, a file has one beside it.
    """
    with ExitStack() as stack:
        with refusals(key, url):
            file = sqlite_path(url)
            if file is not None:
                from filelock import FileLock

                file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(file.with_name(f".{file.name}.lock")))
            else:
                import sqlalchemy

                engine = sqlalchemy.create_engine(url, connect_args=connect_arguments(url))
                stack.callback(engine.dispose)
                stack.enter_context(server_lock(engine, name))
        yield


@contextmanager
def server_lock(engine: sqlalchemy.Engine, name: str) -> Iterator[None]:
    """Hold a lock of a PostgreSQL or MySQL server, which ends with its connection at the latest."""
    import sqlalchemy

    key: int | str
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            take, give = "SELECT pg_advisory_lock(:key)", "SELECT pg_advisory_unlock(:key)"
            key = zlib.crc32(name.encode())
        elif engine.dialect.name in {"mysql", "mariadb"}:
            take, give = "SELECT GET_LOCK(:key, -1)", "SELECT RELEASE_LOCK(:key)"
            key = f"ablate {name}"[:64]
        else:  # Microsoft's: MLflow takes it, and it has no lock of this kind.
            yield
            return
        connection.execute(sqlalchemy.text(take), {"key": key})
        try:
            yield
        finally:
            connection.execute(sqlalchemy.text(give), {"key": key})
