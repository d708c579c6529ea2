"""What removing paths costs, against numbers worked out by hand, and as far as the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ablate.analysis.findings import compute
from ablate.analysis.frames import load
from ablate.report.build import build
from tests.report.synthetic import write_study

WHOLE = 2.5
# By method and threshold, what removal adds to bpb on seeds 0, 1, 2: nothing; 2 hundredths with sd 1; too much.
ADDED = {
    ("dead", 0.0): (0.0, 0.0, 0.0),
    ("random", 0.0): (0.01, 0.02, 0.03),
    ("magnitude", 0.0): (-0.04, -0.04, -0.04),
    ("dead", 0.01): (0.05, 0.06, 0.07),
    ("random", 0.01): (0.05, 0.06, 0.07),
}


def _pruned(place: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    shape: dict[str, Any] = {"controls": False, "tune": True, "usage": 1, "diverged": False}
    write_study(place, factors={"tree.mirror": [0.0, 1.0]}, seeds=seeds, **shape)
    trials = pl.read_parquet(place / "tables/demo/trials.parquet").filter(pl.col("arm") == "tree.mirror=0.0")
    rows = [
        {
            "study": "demo",
            **{key: trial[key] for key in ("trial", "arm", "kind", "seed", "run_id")},
            "method": method,
            "threshold": threshold,
            "removed_frac": 0.125 + threshold,
            "bpb_before": WHOLE,
            "bpb_after": WHOLE + added[trial["seed"] % 3] + (trial["kind"] == "tune"),
            "delta_bpb": added[trial["seed"] % 3],
        }
        for (method, threshold), added in ADDED.items()
        for trial in trials.iter_rows(named=True)
    ]
    pl.DataFrame(rows).write_parquet(place / "tables/demo/prune.parquet")
    return place


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _pruned(tmp_path_factory.mktemp("pruned"))


def test_removal_is_judged_on_pairs_of_the_same_run(root: Path) -> None:
    data = compute(load("demo", root))
    found: dict[tuple[str, float], dict[str, Any]] = {
        (f["reference"].split("/")[1], f["threshold"]): f for f in data["pruning"]
    }
    assert len(found) == len(data["pruning"]) == 5
    free = found["whole", 0.0]
    assert (free["claim"], free["verdict"], free["effect"], free["interval"]) == ("matches", "supported", 0.0, [0, 0])
    assert (free["n"], free["removed_frac"], len(free["run_ids"])) == (3, 0.125, 3)

    random = found["random", 0.0]
    assert random["effect"] == pytest.approx(-0.02)
    assert random["interval"] == pytest.approx([-0.02 - 0.024841, -0.02 + 0.024841], abs=1e-6)  # 4.3027 * .01 / sqrt 3
    assert random["p"] == pytest.approx(0.074180, abs=1e-6)  # t of 3.4641 at two degrees of freedom
    assert random["verdict"] == "inconclusive"

    worse = found["magnitude", 0.0]
    assert (worse["claim"], worse["verdict"]) == ("lower", "refuted"), "removing the small ones helped more"
    # TOST's counterpart: 0.06 - 0.01 over a standard error of .01 / sqrt 3, both sides, second of a family of five.
    assert found["whole", 0.01]["verdict"] == "refuted"
    assert found["random", 0.01]["verdict"] == "refuted", (
        "exactly as random removal: within the margin of no difference"
    )
    [family] = [f for f in data["families"] if f["family"] == "pruning"]
    assert (family["size"], family["adjustment"]) == (5, "bh")


def test_other_findings_do_not_change_where_runs_are_pruned(tmp_path: Path) -> None:
    _pruned(tmp_path, seeds=tuple(range(20)))  # from seventeen on, sign-flip p are drawn
    after = compute(load("demo", tmp_path))
    assert all(f["p_sign_flip"] for f in after["pruning"])
    (tmp_path / "tables/demo/prune.parquet").unlink()
    before = compute(load("demo", tmp_path))
    assert before["pruning"] == []
    for key in before.keys() - {"pruning", "families", "inputs"}:
        assert before[key] == after[key], key


def test_the_report_gives_the_verdicts(root: Path) -> None:
    text = (build("demo", root) / "report.md").read_text(encoding="utf-8")
    assert "Does removal cost anything, and less than removing other units?" in text
    assert "| mirror 0 without subtrees that no token reaches | 12.5% | mirror 0, whole | matches within 0.01 |" in text
    assert "| mirror 0 without subtrees that at most 0.01 of a tree's tokens reach | 13.5% | mirror 0, whole |" in text
