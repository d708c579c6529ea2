"""Which checkout of the project this is: several may use one MLflow server or one Optuna database."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from filelock import FileLock
from optuna.storages import RDBStorage

from ablate.files import write_text

OWNER = "checkout"
"""Attribute of an Optuna study: the checkout that made it."""


def checkout_id(root: Path) -> str:
    """Return the name of the checkout at `root`, made on first use; a copy of a checkout gets another one.

    Args:
        root: the project.
    """
    path = root.resolve() / "state" / "checkout.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = _read(path)
        here = str(path.parent.parent)
        if known.get("path") == here:
            return known["id"]
        # Another path: this checkout was moved, or it is a copy of one that is still there.
        original = Path(known.get("path", "")) / "state" / path.name
        moved = "id" in known and _read(original).get("id") != known["id"]
        name = known["id"] if moved else uuid.uuid4().hex[:12]
        write_text(path, json.dumps({"id": name, "path": here}) + "\n")
        return name


def study_name(storage: RDBStorage, plain: str, checkout: str) -> str:
    """Return the name of a study in a storage: `plain`, unless another checkout has a study of that name there."""
    for frozen in storage.get_all_studies():
        if frozen.study_name == plain:
            owner = frozen.user_attrs.get(OWNER)
            return plain if owner in {None, checkout} else f"{plain}-{checkout}"
    return plain


def _read(path: Path) -> dict[str, str]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    whole = isinstance(data, dict) and isinstance(data.get("id"), str) and isinstance(data.get("path"), str)
    return data if whole else {}
