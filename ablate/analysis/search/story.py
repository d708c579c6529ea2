"""The part of findings.json that only a search has (schema: docs/findings.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from ablate.analysis import arms, contrasts, pareto
from ablate.analysis.arms import level_text
from ablate.analysis.frames import Tables
from ablate.analysis.search.candidates import Means, Search, dominated, probabilities
from ablate.analysis.search.landscape import landscape

NAMED = 3
"""Candidates that the headline names, and that `ablate study promote` takes."""


def story(tables: Tables, rng: np.random.Generator) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything a search showed, and the importances of its settings. It finds candidates and makes no claim."""
    search = Search(tables, arms.outcomes(tables, finalists=True))
    points = np.stack([m.mean for m in search.race], axis=1)
    front = ~dominated(points * search.sign) if len(points) else np.zeros(0, dtype=bool)
    chance = probabilities(points, search.race[0].factor, search.noise, search.sign, rng)
    candidates = _candidates(search, front.tolist(), chance)
    finalists = _finalists(search)
    seen = landscape(search, rng)
    out = {
        "headline": headline(search, candidates, finalists),
        "objectives": [
            {
                "objective": goal.name,
                "better": goal.better,
                "sd": _root(search.noise.covariance[i, i]),
                "df": search.noise.df,
                "worst": _number(search.corner[i]),
            }
            for i, goal in enumerate(tables.study.goals)
        ],
        "sampler": search.plan.get("sampler"),
        "race_seeds": _seeds(search, "search"),
        "finalist_seeds": _seeds(search, "finalist"),
        "base": search.base,
        "factors": search.factors,
        "candidates": candidates,
        "finalists": finalists,
        "history": _history(search),
        "surrogate": seen["surrogate"],
        "dependence": seen["dependence"],
        "maps": seen["maps"],
        "left_out": [str(n) for n in search.plan.get("left_out") or []],
        "held": [str(n) for n in search.plan.get("held") or []],
    }
    return out, seen["importance"]


def _root(variance: float) -> float | None:
    return float(np.sqrt(variance)) if np.isfinite(variance) else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _seeds(search: Search, kind: str) -> list[int]:
    rows = search.tables.trials.filter(search.tables.trials["kind"] == kind)
    return sorted(rows["seed"].unique().to_list())


def _spread(search: Search, phase: list[Means], arm: str) -> dict[str, Any] | None:
    """Each objective's mean, interval and n for a candidate; None where it has none in this phase."""
    if not phase or arm not in phase[0].arms:
        return None
    at = phase[0].arms.index(arm)
    out = {}
    for i, (objective, m) in enumerate(zip(search.objectives, phase, strict=True)):
        mean, half = float(m.mean[at]), search.noise.half(i, float(m.factor[at]))
        out[objective] = {
            "mean": mean,
            "interval": None if half is None else [mean - half, mean + half],
            "n": int(m.n[at]),
        }
    return out


def _plain(search: Search, arm: str) -> dict[str, Any] | None:
    """Means of a candidate of which a run diverged, without intervals: its runs are not of one kind."""
    rows = search.racing.get(arm)
    if rows is None:
        return None
    known = {o: rows[o].drop_nulls().to_list() for o in search.objectives}
    return {o: {"mean": float(np.mean(v)), "interval": None, "n": len(v)} for o, v in known.items() if v} or None


def _candidates(search: Search, front: list[bool], chance: list[float] | None) -> list[dict[str, Any]]:
    """One record a candidate, best first, those without a sound mean last."""
    noted = {str(c.get("arm")): c for c in search.plan.get("candidates") or [] if isinstance(c, dict)}
    sound = {a: i for i, a in enumerate(search.race[0].arms)}
    order = search.ranking + [a for a in search.order if a not in search.ranking]
    trials = search.tables.trials
    groups = trials.partition_by("arm", as_dict=True, maintain_order=True)
    out = []
    for arm in order:
        rows = groups[(arm,)]
        statuses = rows["status"].to_list()
        place = sound.get(arm)
        out.append(
            {
                "arm": arm,
                "rank": search.ranking.index(arm) + 1 if arm in search.ranking else None,
                "settings": search.settings[arm],
                "origin": noted.get(arm, {}).get("origin"),
                "out": noted.get(arm, {}).get("out"),
                "statuses": {s: statuses.count(s) for s in sorted(set(statuses))},
                "racing": _spread(search, search.race, arm) or _plain(search, arm),
                "fresh": _spread(search, search.final, arm),
                "on_front": None if place is None else bool(front[place]),
                "probability": None if place is None or chance is None else chance[place],
                "run_ids": rows["run_id"].to_list(),
            }
        )
    return out


def _finalists(search: Search) -> list[dict[str, Any]]:
    """Per finalist and objective: racing mean against the mean on fresh seeds, and the paired difference from the best."""
    arms_of = [a for a in search.ranking if a in search.final[0].arms]
    out = []
    for i, goal in enumerate(search.tables.study.goals):
        objective = goal.name
        race, final = search.race[i], search.final[i]
        by_seed = {a: dict(zip(search.fresh[a]["seed"], search.fresh[a][objective], strict=True)) for a in arms_of}
        best = min(arms_of, key=lambda a: goal.sign * final.mean[final.arms.index(a)], default=None)
        for arm in arms_of:
            at = final.arms.index(arm)
            record: dict[str, Any] = {
                "arm": arm,
                "objective": objective,
                "racing": None,
                "fresh": float(final.mean[at]),
                "n": int(final.n[at]),
                "fall": None,
                "interval": None,
                "best": best,
                "difference": None,
                "difference_interval": None,
                "run_ids": search.fresh[arm]["run_id"].to_list(),
            }
            if arm in race.arms:
                k = race.arms.index(arm)
                record["racing"] = float(race.mean[k])
                record["fall"] = fall = goal.sign * float(final.mean[at] - race.mean[k])
                if search.noise.within_df:
                    # Other seeds, so differences between seeds count as well.
                    se = np.sqrt(search.noise.within[i] * (1 / race.n[k] + 1 / final.n[at]))
                    half = float(stats.t.ppf(0.975, search.noise.within_df) * se)
                    record["interval"] = [fall - half, fall + half]
            if best is not None and arm != best:
                shared = sorted(by_seed[arm].keys() & by_seed[best].keys())
                if len(shared) >= 2:
                    e = contrasts.paired([by_seed[arm][s] - by_seed[best][s] for s in shared])
                    record["difference"] = float(e.effect)
                    record["difference_interval"] = [float(e.low), float(e.high)]
            out.append(record)
    return out


def _history(search: Search) -> list[dict[str, Any]]:
    """After each candidate: racing runs so far, the best racing mean of each objective, and with two the hypervolume."""
    racing = search.tables.trials.filter(search.tables.trials["kind"] == "search")
    counts = dict(racing.group_by("arm").len().iter_rows())
    place = {a: i for i, a in enumerate(search.race[0].arms)}
    best: dict[str, float] = {}
    seen: list[int] = []
    runs = 0
    out = []
    for arm in search.order:
        runs += counts.get(arm, 0)
        if arm in place:
            seen.append(place[arm])
            for goal, m in zip(search.tables.study.goals, search.race, strict=True):
                o = goal.name
                value = float(m.mean[place[arm]])
                if o not in best or goal.sign * value < goal.sign * best[o]:
                    best[o] = value
        volume = None
        if len(search.objectives) == 2 and seen and np.isfinite(search.corner).all():
            points = np.stack([m.mean[seen] * s for m, s in zip(search.race, search.sign, strict=True)], axis=1)
            corner = search.corner * search.sign
            volume = float(pareto.hypervolume(points[:, 0], -points[:, 1], (float(corner[0]), float(-corner[1]))))
        out.append({"arm": arm, "runs": runs, "best": dict(best), "hypervolume": volume})
    return out


def headline(search: Search, candidates: list[dict[str, Any]], finalists: list[dict[str, Any]]) -> list[str]:
    """What a reader must know first, in a few plain sentences."""
    runs = search.tables.trials.filter(search.tables.trials["kind"] == "search")
    seeds = _seeds(search, "search")
    tried = (
        f"The search tried {len(search.order)} {plural('candidate', len(search.order))} in {runs.height} training runs "
        f"on {len(seeds)} {plural('seed', len(seeds))}"
    )
    if not search.ranking:
        return [f"{tried}. No candidate finished without a diverged run, so none can be named."]
    top = [c for c in candidates if c["rank"] is not None][:NAMED]
    fresh = [c for c in top if c["fresh"]]
    best = top[0]["arm"]
    several = len(search.objectives) > 1
    how = (
        "no other candidate is better in every objective"
        if several
        else "the lowest"
        if search.sign[0] > 0
        else "the highest"
    )
    where = " on fresh seeds" if top[0]["fresh"] else " in the race"
    out = [
        f"{tried}; the best is {best}{where} ({how})."
        if not several
        else f"{tried}; the first choice is {best}{where} ({how})."
    ]
    out += [f"{c['arm']}: {_measured(c)} with {_settings(c['settings'])}{_units(search, c['arm'])}." for c in top]
    out.append(_gain(search, best))
    falls = [f for f in finalists if f["fall"] is not None]
    if falls:
        words = []
        for o in search.objectives:
            own = [f["fall"] for f in falls if f["objective"] == o]
            if own:
                word = "worse" if np.mean(own) > 0 else "better"
                words.append(f"{abs(float(np.mean(own))):.4f} {word} in {o}")
        out.append(
            f"On fresh seeds the {len({f['arm'] for f in falls})} finalists are on average {', '.join(words)} than in the race."
        )
    elif not fresh:
        out.append(
            "No candidate was run on fresh seeds: the figures of the best ones are too good, because luck helped to choose them."
        )
    count = min(NAMED, len(search.ranking))
    out.append(
        f"A search makes no claim. `ablate study promote {search.tables.name} --top {count}` writes "
        f"`studies/{search.tables.name}-confirm.yaml`, a study of {count} {plural('candidate', count)} on new seeds that does."
    )
    return out


def plural(word: str, count: int) -> str:
    """Return a noun in the form that the count needs."""
    return word if count == 1 else f"{word}s"


def _measured(c: dict[str, Any]) -> str:
    found = c["fresh"] or c["racing"]
    parts = []
    for objective, m in found.items():
        half = "" if m["interval"] is None else f" ± {m['interval'][1] - m['mean']:.4f}"
        parts.append(f"{objective} {m['mean']:.4f}{half}")
    n = next(iter(found.values()))["n"]
    return f"{', '.join(parts)} ({n} {'fresh ' if c['fresh'] else ''}{plural('seed', n)})"


def _units(search: Search, arm: str) -> str:
    """What of a candidate's layer a token uses; nothing where the tables do not say so."""
    rows = search.tables.trials.filter(search.tables.trials["arm"] == arm).select("active_units", "total_units")
    active, total = rows.row(0)
    return "" if not active or not total else f"; {active:,.0f} of {total:,.0f} units active ({active / total:.1%})"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k.partition('.')[2].replace('_', ' ')} {text(v)}" for k, v in settings.items())


def text(value: Any) -> str:
    """A setting with at most four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else level_text(value)


def _gain(search: Search, best: str) -> str:
    """What the first candidate gains over the base's own settings, on shared racing seeds, and what it costs."""
    base = search.base
    if base is None:
        return (
            "The settings of the base are not among the candidates, so the gain over them is not known; a confirm study "
            "measures it."
        )
    if base == best:
        return f"The best candidate, {best}, has the settings of the base: the search found nothing better."
    parts = []
    for objective in search.objectives:
        a, b = (
            dict(zip(search.racing[x]["seed"], search.racing[x][objective], strict=True)) if x in search.racing else {}
            for x in (best, base)
        )
        shared = [s for s in sorted(a.keys() & b.keys()) if a[s] is not None and b[s] is not None]
        if not shared:
            continue
        differences = [a[s] - b[s] for s in shared]
        interval = ""
        if len(shared) >= 2:
            e = contrasts.paired(differences)
            interval = f" ({float(e.low):+.4f} to {float(e.high):+.4f})"
        parts.append(f"{objective} {float(np.mean(differences)):+.4f}{interval}")
    if not parts:
        return f"{best} and the base's settings ({base}) share no seed, so the gain is not known."
    return f"Against the base's settings ({base}), on shared racing seeds: {', '.join(parts)}."
