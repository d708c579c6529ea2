"""The answer on a report's first screen: it says what the findings say, and its command is a study that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ablate.analysis.findings import analyse
from ablate.analysis.follow_up import follow_up, undecided
from ablate.analysis.frames import load
from ablate.config import ConfigError, load_study
from ablate.report.answer import Answer, answer
from ablate.report.context import Context
from ablate.report.published import published
from ablate.study.designs import expand
from tests.report.synthetic import write_study

SHIPPED = Path(__file__).parents[2]
ROUTING: dict[str, list[Any]] = {"tree.mirror": [0.0, 1.0], "tree.routing": ["sign", "centred"]}


def said(root: Path, **study: Any) -> tuple[Answer, dict[str, Any]]:
    write_study(root, **study)
    findings = json.loads(analyse("demo", root).read_text())
    return answer(Context(load("demo", root), findings)), findings


def test_a_planted_gain_is_the_headline_and_every_verdict_is_counted(tmp_path: Path) -> None:
    found, findings = said(tmp_path, factors=ROUTING, usage=0, diverged=False)
    assert "centred" in found.headline
    assert found.headline.startswith("Best by balance")
    points = dict(found.points)
    assert "supported" in points["Gain"]
    everything = [f["verdict"] for k in ("findings", "recovered", "pruning") for f in findings[k]]
    count = f"{len(everything)} comparisons in all: {everything.count('supported')} supported"
    assert count in points["Unknown"]
    assert found.command == "ablate study promote demo && ablate study run studies/demo-confirm.yaml"
    made = load_study(follow_up("demo", tmp_path, 3))
    assert made.design == "confirm"
    assert not set(made.seeds) & {s for a in findings["arms"] for s in a["seeds"]}
    assert {c.reference for c in made.contrasts} == {"reference"}
    assert [a.label for a in expand(made).arms if a.kind == "arm"] == ["reference", *made.arms]
    with pytest.raises(ConfigError, match="exists already"):
        follow_up("demo", tmp_path, 3)


def test_one_seed_shows_nothing_and_says_so(tmp_path: Path) -> None:
    found, _ = said(tmp_path, factors=ROUTING, seeds=[0], controls=False, tune=False, usage=0, diverged=False)
    assert found.headline == "No two arms can be compared in this study, so it shows no best arm."


@pytest.mark.parametrize("name", published(SHIPPED))
def test_what_a_published_study_says_to_run_next_is_a_study_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / f"{name}.yaml").write_bytes((SHIPPED / f"studies/{name}.yaml").read_bytes())
    source = tmp_path / "reports" / name / "findings.json"
    source.parent.mkdir(parents=True)
    source.write_bytes((SHIPPED / f"reports/{name}/findings.json").read_bytes())
    study, findings = load_study(tmp_path / "studies" / f"{name}.yaml"), json.loads(source.read_bytes())
    if findings["reference"] is None:
        with pytest.raises(ConfigError, match="nothing to confirm"):
            follow_up(name, tmp_path, 3)
        return
    made = load_study(follow_up(name, tmp_path, 3))
    plan = expand(made)
    assert {t.seed for t in plan.trials} == set(made.seeds)
    assert not set(made.seeds) & set(study.seeds)
    left = {(f["arm"], f["reference"], f["endpoint"]) for f in undecided(study, findings)}
    if left:
        assert {(c.arm, c.reference, c.endpoint) for c in made.contrasts} == left
