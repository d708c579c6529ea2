"""`ablate study promote`: the file it writes is a study that runs, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ablate.analysis.search.promote import promote
from ablate.config import ConfigError, load_study
from ablate.study.designs import expand
from tests.report.synthetic import write_study
from tests.report.synthetic_search import CONDITIONAL, FACTORS, FRESH, RACE, write_search


@pytest.mark.parametrize("match", ["none", "total_units"])
@pytest.mark.parametrize("objectives", [("bpb",), ("bpb", "n_eff_frac"), ("bpb", "n_eff_frac", "dead_frac")])
@pytest.mark.parametrize("finalists", [0, 3])
def test_the_file_is_a_confirm_study(tmp_path: Path, match: str, objectives: Any, finalists: int) -> None:
    write_search(tmp_path, objectives=objectives, match=match, finalists=finalists, factors=FACTORS | CONDITIONAL)
    path = promote("hunt", tmp_path, 3)
    assert path == tmp_path / "studies/hunt-confirm.yaml"
    made = load_study(path)
    plan = expand(made)
    assert made.design == "confirm"
    assert made.match == "none"
    assert [a.label for a in plan.arms] == ["reference", *made.arms]
    assert len(made.arms) == 3
    assert len(made.contrasts) == 3 * len(objectives)
    claims = {c.endpoint: (c.claim, c.margin) for c in made.contrasts}
    assert claims["bpb"] == ("lower", made.margin)
    assert claims.get("n_eff_frac", ("higher", made.min_effect_n_eff)) == ("higher", made.min_effect_n_eff)
    assert claims.get("dead_frac", ("lower", made.min_effect_n_eff)) == ("lower", made.min_effect_n_eff)
    assert len(made.seeds) == 10
    assert not set(made.seeds) & {*RACE, *(FRESH if finalists else ())}
    assert "ablate study promote hunt --top 3" in path.read_text(encoding="utf-8").splitlines()[1]
    if match != "none":
        assert all("tree.trees" in a or "tree.leaf_width" in a for a in made.arms.values())


def test_the_best_by_fresh_seeds_come_first(tmp_path: Path) -> None:
    write_search(tmp_path, objectives=("bpb",))
    made = load_study(promote("hunt", tmp_path, 5))
    assert len(made.arms) == 5  # three finalists, then the next by their racing means
    from ablate.analysis.findings import compute
    from ablate.analysis.frames import load

    rows = compute(load("hunt", tmp_path))["search"]["candidates"]
    fresh = sorted((r for r in rows if r["fresh"]), key=lambda r: r["fresh"]["bpb"]["mean"])
    assert list(made.arms)[:3] == [r["arm"] for r in fresh]


def test_what_is_refused(tmp_path: Path) -> None:
    write_study(tmp_path, usage=0)
    with pytest.raises(ConfigError, match="design 'factorial': only a search"):
        promote("demo", tmp_path, 3)
    write_search(tmp_path, "lost", diverged="all", count=4)
    with pytest.raises(ConfigError, match="no candidate whose runs all finished"):
        promote("lost", tmp_path, 3)
    write_search(tmp_path, "base", count=1, diverged="none", finalists=0)
    with pytest.raises(ConfigError, match="found nothing but its base"):
        promote("base", tmp_path, 3)
    write_search(tmp_path, "same", count=1, diverged="none", finalists=0, factors=FACTORS | CONDITIONAL, spelled=True)
    with pytest.raises(ConfigError, match="c001 is the same configuration as the base"):
        promote("same", tmp_path, 3)
    write_search(tmp_path)
    kept = promote("hunt", tmp_path, 1).read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        promote("hunt", tmp_path, 2)
    assert (tmp_path / "studies/hunt-confirm.yaml").read_bytes() == kept


def test_the_command_says_what_it_wrote_and_never_overwrites(tmp_path: Path) -> None:
    write_search(tmp_path, count=12)
    command = [str(Path(sys.executable).parent / "ablate"), "study", "promote", "hunt", "--top", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "studies/hunt-confirm.yaml" in done.stdout.replace("\n", "")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("ablate: study file 'studies/hunt-confirm.yaml' exists already")
    assert json.dumps(list(load_study(tmp_path / "studies/hunt-confirm.yaml").arms)).count("c0") == 2
