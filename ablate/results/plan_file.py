"""Read the plan that a study wrote before its first trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from ablate.config import ConfigError
from ablate.results.layout import Layout
from ablate.results.seal import Broken, unsealed

_PARTS: Mapping[str, type] = {
    "study": str,
    "design": str,
    "hash": str,
    "space": str,
    "seeds": list,
    "objectives": list,
    "notes": list,
    "arms": list,
    "trials": list,
    "waiting_for_tune": int,
    "tuned": dict,
}
_TRIAL: Mapping[str, type | tuple[type, ...]] = {
    "trial": str,
    "arm": str,
    "kind": str,
    "seed": int,
    "lr": (int, float),
    "factors": dict,
}


def load_plan(layout: Layout) -> dict[str, Any] | None:
    """Return plan.json as plain data, None where there is none; raises ConfigError for a damaged one."""
    try:
        content = layout.plan.read_bytes()
    except FileNotFoundError:
        return None
    return plan_from(content, layout.plan)


def plan_from(content: bytes, path: Path) -> dict[str, Any]:
    """Return a plan as plain data; raises ConfigError where it is damaged."""
    try:
        data = from_json(unsealed(content)[0])
        why = _missing(data)
    except Broken as error:
        why = str(error)
    except ValueError:
        why = "it is not JSON"
    if why:
        raise ConfigError(
            f"plan {str(path)!r} is damaged ({why}): `ablate doctor --fix` sets it aside, and the study's next run writes it"
        )
    return dict(data)


def _missing(data: Any) -> str:
    """Return what a plan lacks, empty where nothing."""
    if not isinstance(data, dict):
        return "it is no object"
    for name, kind in _PARTS.items():
        if not isinstance(data.get(name), kind):
            return f"{name} is missing or wrong"
    for trial in data["trials"]:
        if not isinstance(trial, dict) or not all(isinstance(trial.get(key), kind) for key, kind in _TRIAL.items()):
            return "an entry of trials is wrong"
    for arm in data["arms"]:
        if not isinstance(arm, dict) or not isinstance(arm.get("label"), str):
            return "an entry of arms is wrong"
    if data["design"] == "search" and not isinstance(data.get("search"), dict):
        return "search is missing or wrong"
    return ""
