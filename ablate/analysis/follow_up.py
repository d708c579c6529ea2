"""From a finished study to the study that settles what it left open: a `confirm` study on seeds it never used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ablate.analysis.families import COST, depth_varies
from ablate.config import ConfigError, Study, load_study, parse
from ablate.config.endpoints import BITS_LOST, N_EFF
from ablate.config.study import check_field
from ablate.results.layout import Layout

SEEDS = 10
MORE = 4
"""Times the seeds of a study that its follow-up has at most: a margin may need more seeds than anyone will run."""


def follow_up(name: str, root: Path, top: int) -> Path:
    """Write studies/<name>-confirm.yaml from a study's findings, ready to run; returns its path.

    Of a `confirm` study these are the contrasts that it left undecided, with the seeds that their margins need (at most
    four times its own); where it decided all, the same contrasts at twice the training. Of any other study these are
    its best arms by balance and by quality against the reference arm, on 10 seeds.

    Raises:
        ConfigError: there are no findings, nothing to follow up, or the file exists already.
    """
    study, layout = load_study(root / "studies" / f"{name}.yaml"), Layout(root, name)
    known = [place / "findings.json" for place in (layout.report, layout.published)]
    source = next((path for path in known if path.exists()), None)
    if source is None:
        raise ConfigError(f"{str(known[0])!r} does not exist: run `ablate analyse {name}` first")
    findings = json.loads(source.read_text(encoding="utf-8"))
    target = root / "studies" / f"{name}-confirm.yaml"
    if target.exists():
        raise ConfigError(f"study file {str(target)!r} exists already: rename or delete it first")
    data = drafted(study, findings, top)
    if data is None:
        raise ConfigError(
            f"study {name!r} has no arm that measured better than its reference: there is nothing to confirm"
        )
    parse(Study, data)
    head = f"# {_why(study, findings)}\n# Written by `ablate study promote {name}`; its seeds belong to no run of {name}.\n"
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    with target.open("x", encoding="utf-8") as file:
        file.write(head + body)
    return target


def drafted(study: Study, findings: dict[str, Any], top: int) -> dict[str, Any] | None:
    """Return the follow-up of a study as the data of a study file; None where no arm is worth one."""
    drawn = _again(study, findings) if study.design == "confirm" else _best(study, findings, top)
    if drawn is None:
        return None
    used = {s for a in findings["arms"] for s in a["seeds"]} | set(study.seeds)
    used |= set(study.tune.seeds) if study.tune else set()
    first = (max(used) // 100 + 1) * 100
    count = drawn.pop("count")
    kept = {"preset": study.preset, "controls": study.controls, "match": study.match}
    limits = {"margin": study.margin, "min_effect_n_eff": study.min_effect_n_eff}
    heading = {"name": f"{study.name}-confirm", "title": drawn.pop("title"), "design": "confirm"}
    return {**heading, **kept, **drawn, "seeds": list(range(first, first + count)), **limits}


def undecided(study: Study, findings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the named contrasts that more seeds could decide, as findings."""
    families = {"confirm", COST} if study.design == "confirm" else set()
    named = [f for f in findings["findings"] if f["family"] in families]
    return [f for f in named if f["verdict"] == "inconclusive" and not f["reasons"]]


def _again(study: Study, findings: dict[str, Any]) -> dict[str, Any]:
    left = undecided(study, findings)
    ids = {(f["arm"], f["reference"], f["endpoint"]) for f in left}
    contrasts = [c for c in study.contrasts if not ids or (c.arm, c.reference, c.endpoint) in ids]
    base, count, title = dict(study.base), len(study.seeds), f"What {study.name} left undecided, on new seeds"
    if left:
        needed = {p["endpoint"]: p["seeds_for_margin"] or MORE * count for p in findings["power"]}
        count = min(MORE * count, max(count, *(needed.get(f["endpoint"], count) for f in left)))
    else:
        base["train"] = {**base.get("train", {}), "steps": 2 * study.trial({}).train.steps}
        title = f"Do the findings of {study.name} hold for twice the training?"
    members = {x for c in contrasts for x in (c.arm, c.reference)}
    return {
        "title": title,
        "base": base,
        "arms": {a: dict(changes) for a, changes in study.arms.items() if a in members} or dict(study.arms),
        "contrasts": [c.model_dump(mode="json") for c in contrasts],
        "count": count,
    }


def _best(study: Study, findings: dict[str, Any], top: int) -> dict[str, Any] | None:
    """The arms that measured best by balance and by quality, in turn, against the reference."""
    arms = {a["arm"]: a for a in findings["arms"] if a["kind"] == "arm"}
    reference = arms.get(findings["reference"] or "")
    if reference is None:
        return None
    chosen: dict[str, str] = {}
    ranked = []
    balance, q = BITS_LOST if depth_varies(study) else N_EFF, study.quality
    for goal in (balance, q):
        known = [a for a in arms.values() if a[goal.name] and reference[goal.name]]
        better = [a for a in known if goal.sign * (a[goal.name]["mean"] - reference[goal.name]["mean"]) < 0]
        ranked.append([(a["arm"], goal.name) for a in sorted(better, key=lambda a: goal.sign * a[goal.name]["mean"])])
    for place in range(max(map(len, ranked))):
        for arm, goal_name in (r[place] for r in ranked if place < len(r)):
            if len(chosen) < top:
                chosen.setdefault(arm, goal_name)
    if not chosen:
        return None
    settings = {a: _known(arms[a]["factors"]) | study.arms.get(a, {}) for a in chosen}
    own = _known(reference["factors"])
    base: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in study.base.items()}
    for key, value in own.items():
        section, _, field = key.partition(".")
        base.setdefault(section, {})[field] = value
    contrasts = []
    for arm, by in chosen.items():
        if by == balance.name:
            contrasts.append({"arm": arm, "endpoint": by, "claim": balance.better, "margin": balance.margin_of(study)})
        claim = q.better if by == q.name else "matches"
        contrasts.append({"arm": arm, "endpoint": q.name, "claim": claim, "margin": study.margin})
    changes = {a: {k: v for k, v in s.items() if own.get(k) != v} for a, s in settings.items()}
    title = f"Do the best arms of {study.name} hold on new seeds?"
    return {"title": title, "base": base, "arms": changes, "contrasts": contrasts, "count": SEEDS}


def _known(factors: dict[str, Any]) -> dict[str, Any]:
    """Return the levels of an arm as a study file writes them, without those that play no part in it."""
    return {key: check_field(key, value) for key, value in factors.items() if value is not None}


def _why(study: Study, findings: dict[str, Any]) -> str:
    if study.design != "confirm":
        return f"The arms of {study.name} that measured best, against its reference arm."
    left = len(undecided(study, findings))
    return (
        f"The {left} contrasts that {study.name} left undecided."
        if left
        else f"{study.name} again, trained twice as long."
    )
