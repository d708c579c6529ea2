"""Where Optuna's database is, and how its address may be shown."""

from __future__ import annotations

from pathlib import Path


def default_storage(root: Path) -> str:
    """Return the URL of the SQLite database under the project's state folder."""
    return f"sqlite:///{(root / 'state' / 'optuna.db').resolve()}"


def shown(url: str) -> str:
    """Return a database URL as it may be printed: without its password."""
    if "@" not in url:
        return url
    from sqlalchemy.engine import make_url  # slow to import, and seldom needed here

    return make_url(url).render_as_string(hide_password=True)
