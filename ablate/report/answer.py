"""The answer of a study in a few plain sentences: best arm, gain, cost, what is unknown, what to run next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ablate.analysis.follow_up import drafted, undecided
from ablate.analysis.search.story import NAMED
from ablate.config.endpoints import BITS_LOST, ENDPOINTS, N_EFF, Endpoint
from ablate.report.context import Context

VERDICTS = ("supported", "refuted", "inconclusive")
LEVELS = "factors"  # the family that compares levels of factors, not arms


@dataclass(frozen=True)
class Answer:
    """What a reader of the first screen learns."""

    headline: str
    points: list[tuple[str, str]] = field(default_factory=list)
    """A word (gain, cost, unknown) and its sentence."""
    next: str = ""
    command: str = ""
    """What to paste into a shell in the project's folder."""


def answer(c: Context) -> Answer:
    """Return the answer that a study's findings give."""
    if c.findings["design"] == "search":
        return _of_search(c)
    what, command = _next(c)
    best = _best(c)
    if best is None:
        headline, points = _nothing_shown(c)
    else:
        headline = (
            f"Best by {_plain(ENDPOINTS[best['endpoint']])}: {best['arm_label']} instead of {best['reference_label']}."
        )
        points = [("Gain", _gain(c, best)), ("Cost", _cost(c, best))]
    return Answer(headline, [*points, ("Unknown", _unknown(c))], what, command)


def counts(findings: Iterable[dict[str, Any]]) -> str:
    """Return how many findings have each verdict, in words."""
    found = [f["verdict"] for f in findings]
    return ", ".join(f"{found.count(v)} {v}" for v in VERDICTS)


def _gains(f: dict[str, Any]) -> bool:
    """Whether a finding shows that its arm is better than its reference."""
    endpoint = ENDPOINTS.get(f["endpoint"])
    shown = f["verdict"] == "supported" and f["claim"] != "matches" and f["effect"] is not None
    return bool(shown and endpoint and endpoint.sign * f["effect"] < 0 and f["family"] != "dense")


def _best(c: Context) -> dict[str, Any] | None:
    """The largest gain that is shown: of whole arms before levels, in balance before quality, free before costly."""
    ranked = [
        (
            (
                f["family"] == LEVELS,
                not _balance(f["endpoint"]),
                _costs(c, f),
                -abs(f["effect"]) / f["margin"],
                f["id"],
            ),
            f,
        )
        for f in c.findings["findings"]
        if _gains(f)
    ]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def _costs(c: Context, gain: dict[str, Any]) -> bool:
    """Whether the study shows that a gain is paid for."""
    other = _counterpart(c, gain)
    if other is None or other["effect"] is None:
        return False
    sign = ENDPOINTS[other["endpoint"]].sign
    decided = other["verdict"] == ("refuted" if other["claim"] in {"matches", "lower", "higher"} else "supported")
    return bool(decided and sign * other["effect"] > 0)


def _counterpart(c: Context, gain: dict[str, Any]) -> dict[str, Any] | None:
    """The same comparison on the other endpoint: quality for a gain in balance, and balance for one in quality."""
    of_quality = gain["endpoint"] == c.quality.name
    same = ("arm_label", "reference_label")
    found = [
        f
        for f in c.findings["findings"]
        if (_balance(f["endpoint"]) if of_quality else f["endpoint"] == c.quality.name)
        and f["family"] != "dense"
        and all(f[k] == gain[k] for k in same)
    ]
    return found[0] if found else None


def _balance(endpoint: str) -> bool:
    return endpoint in ENDPOINTS and ENDPOINTS[endpoint].part == "balance"


def _gain(c: Context, f: dict[str, Any]) -> str:
    arms = {a["arm"]: a for a in c.findings["arms"]}
    arm, other = arms.get(f.get("arm", "")), arms.get(f.get("reference", ""))
    name = f["endpoint"]
    if name == N_EFF.name and f["family"] != LEVELS and arm and other and arm[name] and other[name]:
        now, then = arm[name]["mean"], other[name]["mean"]
        return f"{now:.0%} of the leaves in effective use instead of {then:.0%} ({_measured(f)})."
    return f"{_effect(f)} ({_measured(f, effect=False)})."


def _cost(c: Context, gain: dict[str, Any]) -> str:
    other = _counterpart(c, gain)
    if other is None or other["effect"] is None or not other["interval"]:
        what = _plain(c.quality if gain["endpoint"] != c.quality.name else N_EFF)
        return f"Not compared in {what}.{_arithmetic(c, gain)}"
    sign, margin = ENDPOINTS[other["endpoint"]].sign, f"the margin of {other['margin']:g}"
    best, worst = sorted(sign * x for x in other["interval"])
    if other["verdict"] == "supported" and other["claim"] == "matches":
        said = f"None over {margin}"
    elif other["verdict"] == "supported" and sign * other["effect"] < 0:
        said = "None, but a gain as well"
    elif _costs(c, gain):
        said = "Shown"
    elif best > 0:
        said = f"Seen, but not settled whether it is over {margin}"
    else:
        said = "None seen, but not shown" if worst < 0 else f"Not settled against {margin}"
    return f"{said}: {_effect(other)} ({_measured(other, effect=False)}).{_arithmetic(c, gain)}"


def _arithmetic(c: Context, f: dict[str, Any]) -> str:
    arms = {a["arm"]: a for a in c.findings["arms"]}
    arm, other = arms.get(f.get("arm", "")), arms.get(f.get("reference", ""))
    keys = ("flops_per_token", "active_units")
    if f["family"] == LEVELS or not arm or not other or not all(a[k] for a in (arm, other) for k in keys):
        return ""
    flops, units = (f"{arm[k] / other[k]:.2f}" for k in keys)
    if flops == units == "1.00":
        return " A token takes the same arithmetic and touches as many units."
    return f" A token takes {flops} times the arithmetic and touches {units} times the units."


def _effect(f: dict[str, Any]) -> str:
    endpoint = ENDPOINTS.get(f["endpoint"])
    if endpoint is None:
        return f"{f['effect']:+.4f} {f['endpoint']}"
    return f"{f['effect']:+{endpoint.form}} {endpoint.unit or endpoint.label}"


def _measured(f: dict[str, Any], *, effect: bool = True) -> str:
    form = ENDPOINTS[f["endpoint"]].form if f["endpoint"] in ENDPOINTS else ".4f"
    low, high = f["interval"]
    head = f"{f['effect']:+{form}}, " if effect else ""
    unit = "seeds" if f["n"] <= len(f["seeds"]) else "runs"
    return f"{head}95% interval {low:+{form}} to {high:+{form}}, {f['n']} {unit}, {f['verdict']}"


def _plain(endpoint: Endpoint) -> str:
    return "balance" if endpoint.name in {N_EFF.name, BITS_LOST.name} else endpoint.label


def _nothing_shown(c: Context) -> tuple[str, list[tuple[str, str]]]:
    found = [f for f in c.findings["findings"] if f["effect"] is not None and f["interval"] is not None]
    own = [f for f in found if f["family"] not in {"dense", LEVELS}]
    points = []
    if c.findings["pruning"]:
        points.append(("Pruning", f"Removing subtrees that hardly any token takes: {counts(c.findings['pruning'])}."))
    if not found:
        return "No two arms can be compared in this study, so it shows no best arm.", points
    measured = [f for f in own or found if _balance(f["endpoint"])] or own or found
    best = min(
        measured, key=lambda f: (ENDPOINTS[f["endpoint"]].sign if f["endpoint"] in ENDPOINTS else -1) * f["effect"]
    )
    points.insert(
        0,
        (
            "Largest",
            f"{best['arm_label']} against {best['reference_label']}: {_effect(best)} "
            f"({_measured(best, effect=False)}, after adjustment for {best['family_size']} comparisons).",
        ),
    )
    return (
        "No arm is shown to be better than another: after adjustment for all comparisons no difference stands out from noise.",
        points,
    )


def _unknown(c: Context) -> str:
    found = [*c.findings["findings"], *c.findings["recovered"], *c.findings["pruning"]]
    parts = [f"Of {len(found)} comparisons in all: {counts(found)}."] if found else []
    for p in c.findings["power"]:
        if p["detectable"] <= p["margin"]:
            continue
        needed = f"{p['seeds_for_margin']} seeds" if p["seeds_for_margin"] else "over 100 seeds"
        endpoint = ENDPOINTS[p["endpoint"]]
        parts.append(
            f"In {_plain(endpoint)}, {p['n']} seeds find differences of {p['detectable']:.2g} or more; "
            f"the margin of {p['margin']:g} needs {needed}."
        )
    if c.findings["design"] != "confirm":
        parts.append("The study explores: what it finds is a candidate until a `confirm` study has tested it.")
    models = {a["total_params"] for a in c.findings["arms"] if a["total_params"] is not None}
    if models:
        parts.append(f"Models have up to {max(models):,.0f} parameters; whether it holds at other sizes is open.")
    return " ".join(parts)


def _next(c: Context) -> tuple[str, str]:
    """What to run next, in words and as a command."""
    name, study = c.tables.name, c.tables.study
    file = f"studies/{name}.yaml"
    if any("no result yet" in d or "still wait" in d for d in c.findings["deviations"]):
        return "Not all planned trials have a result; run the rest:", f"ablate study run {file}"
    data = drafted(study, c.findings, 3)
    if data is None:
        why = (
            "No arm measured better than its reference"
            if c.findings["reference"]
            else "There is no arm to compare with"
        )
        return f"{why}. Give the study other arms, and look at its plan:", f"ablate study plan {file}"
    count = len(data["seeds"])
    if study.design == "confirm":
        left = len(undecided(study, c.findings))
        what = (
            f"Decide the {left} open {'contrast' if left == 1 else 'contrasts'} on {count} new seeds:"
            if left
            else "Every contrast that more seeds could decide is decided. See whether the findings hold for twice the training:"
        )
    else:
        arms = len(data["arms"])
        what = f"Test the {f'{arms} best arms' if arms > 1 else 'best arm'} against the reference on {count} new seeds:"
    return what, f"ablate study promote {name} && ablate study run studies/{name}-confirm.yaml"


def _of_search(c: Context) -> Answer:
    name = c.tables.name
    said = [str(s) for s in c.findings["search"]["headline"]]
    ranked = sum(r["rank"] is not None for r in c.findings["search"]["candidates"])
    if not ranked:
        return Answer(said[0], [], "No candidate has finished; go on:", f"ablate study run studies/{name}.yaml")
    unknown = "A search finds candidates and makes no claim: the best of many noisy means is better than it deserves."
    what = "Test the best candidates against the base on seeds that the search never used:"
    command = f"ablate study promote {name} && ablate study run studies/{name}-confirm.yaml"
    # After the first line one for each candidate that is named, then the first of them against the base.
    points = [("First choice", said[1]), ("Gain", said[1 + min(NAMED, ranked)]), ("Unknown", unknown)]
    return Answer(said[0], points, what, command)
