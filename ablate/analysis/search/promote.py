"""From a finished search to a study that can make claims: its best candidates against the base, on seeds never used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ablate.analysis import arms
from ablate.analysis.frames import load
from ablate.analysis.search.candidates import Search, same
from ablate.analysis.search.story import text
from ablate.config import ConfigError, Scalar, Study, Trial, parse

SEEDS = 10


def promote(name: str, root: Path, top: int) -> Path:
    """Write studies/<name>-confirm.yaml from the tables of search `name`, ready to run; returns its path.

    Its arms are the `top` best candidates: finalists by their means on fresh seeds, then the others by their racing
    means. Each is compared with the base on every objective, over 10 paired seeds that the search never used. Sizes that
    matching worked out are written as numbers.

    Raises:
        ConfigError: the study is no search, no candidate finished, or the file exists already.
    """
    tables = load(name, root)
    study = tables.study
    if study.design != "search":
        raise ConfigError(f"study {name!r} has design {study.design!r}: only a search has candidates to promote")
    target = root / "studies" / f"{name}-confirm.yaml"
    if target.exists():
        raise ConfigError(f"study file {str(target)!r} exists already: rename or delete it first")
    search = Search(tables, arms.outcomes(tables, finalists=True))
    if not search.ranking:
        raise ConfigError(
            f"search {name!r} has no candidate whose runs all finished: run `ablate study run studies/{name}.yaml` on, "
            f"then `ablate collect {name}`"
        )
    base = study.trial({})
    chosen: dict[str, dict[str, Scalar]] = {}
    seen = {_identity(base): "the base"}
    skipped: list[str] = []
    for arm in search.ranking:
        if len(chosen) == top:
            break
        changes = changed(study, search.settings[arm])
        key = _identity(study.trial(changes))
        if key in seen:
            skipped.append(f"{arm} is the same configuration as {seen[key]}")
            continue
        seen[key] = arm
        chosen[arm] = changes
    if not chosen:
        raise ConfigError(f"search {name!r} found nothing but its base: {'; '.join(skipped)}")
    data: dict[str, Any] = {
        "name": f"{name}-confirm",
        "title": f"Do the best candidates of the search {name!r} hold on new seeds?",
        "design": "confirm",
        "preset": study.preset,
        "base": study.base,
        "arms": chosen,
        "contrasts": [
            {
                "arm": arm,
                "endpoint": goal.name,
                "claim": goal.better,
                "margin": goal.margin_of(study),
            }
            for arm in chosen
            for goal in study.goals
        ],
        "seeds": unused(search),
        "margin": study.margin,
        "min_effect_n_eff": study.min_effect_n_eff,
    }
    parse(Study, data)
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    with target.open("x", encoding="utf-8") as file:
        file.write("".join(f"# {line}\n" for line in _head(search, chosen, skipped, top)) + body)
    return target


def _identity(trial: Trial) -> str:
    """Return the hash of a configuration that two spellings of one tree share."""
    return trial.model_copy(update={"tree": trial.tree.plain()}).hash()


def changed(study: Study, settings: dict[str, Any]) -> dict[str, Scalar]:
    """A candidate's settings that differ from the base, as the study file writes them."""
    known = study.trial({key: value for key, value in settings.items() if value is not None})
    base = study.trial({})
    return {key: known.value(key) for key in settings if not same(known.value(key), base.value(key))}


def unused(search: Search) -> list[int]:
    """Ten seeds in a row, from the next hundred after every seed that the search ran or named."""
    study = search.tables.study
    used = {*search.tables.trials["seed"].to_list(), *study.seeds}
    used |= set(getattr(getattr(study, "finalists", None), "seeds", None) or [])
    for key in ("race_seeds", "finalist_seeds"):
        used |= {int(s) for s in search.plan.get(key) or []}
    first = (max(used) // 100 + 1) * 100
    return list(range(first, first + SEEDS))


def _head(search: Search, chosen: dict[str, Any], skipped: list[str], top: int) -> list[str]:
    study = search.tables.study
    lines = [
        f"The {len(chosen)} best of {len(search.order)} candidates of the search {search.tables.name!r}, against its base;",
        f"written by `ablate study promote {search.tables.name} --top {top}`. Seeds are ones that the search never used.",
    ]
    for arm in chosen:
        phase, word = (search.final, "fresh seeds") if arm in search.final[0].arms else (search.race, "racing seeds")
        at = phase[0].arms.index(arm)
        measured = ", ".join(f"{o} {m.mean[at]:.4f}" for o, m in zip(search.objectives, phase, strict=True))
        n = int(phase[0].n[at])
        lines.append(f"{arm}: {measured}, mean of {n} {word if n > 1 else word.removesuffix('s')}.")
    settled = [k for k in search.factors if k not in study.factors]
    if study.match != "none" and settled:
        lines.append(
            f"{', '.join(settled)}: worked out by match {study.match!r} in the search, written as numbers here."
        )
    if "train.lr" in study.factors:
        lines.append(
            f"Each arm has the learning rate that the search found for it; the base has {text(study.trial({}).train.lr)}, untuned."
        )
    return lines + [f"Left out: {s}." for s in skipped]
