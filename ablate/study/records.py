"""Write a study's plan before its first trial."""

from __future__ import annotations

import json
from typing import Any

from ablate.config import ConfigError, digest
from ablate.files import write_text
from ablate.results.layout import Layout
from ablate.results.plan_file import load_plan
from ablate.results.seal import sealed
from ablate.study.designs import Plan


def plan_document(
    plan: Plan, tuned: dict[str, Any] | None = None, search: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The plan as plain data for plan.json."""
    study = plan.study
    return {
        "study": study.name,
        "title": study.title,
        "design": study.design,
        "hash": plan.hash,
        "space": plan.space,
        "study_hash": digest({"title": study.title, "notes": study.notes, **study.settled()}),
        "seeds": study.seeds,
        "objectives": study.objectives,
        "notes": list(plan.notes),
        "arms": [
            {"label": arm.label, "kind": arm.kind, "changes": dict(arm.changes), "derived": arm.derived}
            for arm in plan.arms
        ],
        "trials": [
            {
                "trial": t.hash,
                "arm": t.arm,
                "kind": t.kind,
                "seed": t.seed,
                "lr": t.trial.train.lr,
                "factors": dict(t.factors),
            }
            for t in plan.trials
        ],
        "waiting_for_tune": plan.waiting_for_tune,
        "tuned": tuned or {},
        **({"tuning": {"least": plan.tuning[0], "most": plan.tuning[1]}} if study.tune else {}),
        **({"search": {"budget": study.budget.model_dump(), **(search or {})}} if study.design == "search" else {}),
    }


def save_plan(
    layout: Layout, plan: Plan, tuned: dict[str, Any] | None = None, search: dict[str, Any] | None = None
) -> None:
    """Write plan.json, before the first trial.

    Raises:
        ConfigError: the study is a `confirm` whose plan was hashed before and is another now.
    """
    old = load_plan(layout)
    if plan.study.design == "confirm" and old and old.get("hash") != plan.hash:
        raise ConfigError(
            f"plan hash is {plan.hash}: study {plan.study.name!r} was fixed as {old.get('hash')} before its first "
            f"trial, and a confirm plan may not change; restore the file or start a study with another name"
        )
    text = sealed(json.dumps(plan_document(plan, tuned, search), indent=1, ensure_ascii=False, allow_nan=False))
    if not layout.plan.exists() or layout.plan.read_text(encoding="utf-8") != text:
        write_text(layout.plan, text)
