"""Where Optuna's database is, and how its address may be shown."""

from __future__ import annotations

from pathlib import Path


def default_storage(root: Path) -> str:
    """Return the URL of the SQLite database under the project's state folder."""
    return sqlite_url(root / "state" / "optuna.db")


def sqlite_url(file: Path) -> str:
    """Return the URL of an SQLite file, whatever its folders are called: in a URL, % and ? have a meaning."""
    path = str(file.resolve())
    coded = path.replace("%", "%25").replace("?", "%3F")
    # MLflow makes the folder of a URL that begins with sqlite:///, and makes it with the percent code for a name.
    return f"sqlite:///{coded}" if coded == path else f"sqlite+pysqlite:///{coded}"


def shown(url: str) -> str:
    """Return a database URL as it may be printed: without its password."""
    if "@" not in url:
        return url
    from sqlalchemy.engine import make_url  # slow to import, and seldom needed here

    return make_url(url).render_as_string(hide_password=True)
