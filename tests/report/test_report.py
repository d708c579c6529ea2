"""The report of a synthetic study: what it says, that it says the same twice, and that names stay names."""

from __future__ import annotations

import hashlib
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ablate.analysis.findings import analyse
from ablate.analysis.frames import load
from ablate.config import ConfigError
from ablate.report import parts
from ablate.report.build import build
from ablate.report.compare import compare
from ablate.report.views import VIEWS
from tests.report.synthetic import write_study

EVIL = "<script>alert(1)</script> `x` $y$ | %{z} [l](u) &amp; \"q'"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    factors: dict[str, list[Any]] = {"tree.mirror": [0.0, 1.0], "tree.routing": ["sign", "centred"]}
    write_study(root, factors=factors, arms={EVIL: {"tree.router": "frozen"}}, title=EVIL, machine=EVIL)
    build("demo", root, "http://127.0.0.1:5000/")
    return root


@pytest.fixture(scope="module")
def findings(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "out/demo/findings.json").read_text()))


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_same_tables_give_the_same_bytes(root: Path) -> None:
    before = files(root / "out/demo")
    analyse("demo", root)
    build("demo", root, "http://127.0.0.1:5000")
    assert files(root / "out/demo") == before
    assert {p.split("/")[0] for p in before} == {
        "findings.json",
        "metrics.json",
        "index.html",
        "report.md",
        "figures",
        "tables",
        "plots",
    }


def test_every_finding_has_what_the_schema_promises(findings: dict[str, Any], root: Path) -> None:
    known = set(pl.read_parquet(root / "tables/demo/trials.parquet")["run_id"])
    assert {f["family"] for f in findings["findings"]} == {"arms", "dense", "factors"}
    for f in findings["findings"]:
        assert f["verdict"] in {"supported", "refuted", "inconclusive"}
        assert f["run_ids"]
        assert set(f["run_ids"]) <= known
        assert f["n"] >= 2
        assert f["interval"][0] <= f["effect"] <= f["interval"][1]
        assert 0 <= f["p"] <= f["p_adjusted"] <= 1 or f["adjustment"] == "bh"
    documented = Path("docs/findings.md").read_text(encoding="utf-8")
    fields = set(findings) | {k for f in findings["findings"] for k in f}
    assert [k for k in sorted(fields) if f"`{k}`" not in documented] == []


def test_planted_truth_is_found_end_to_end(findings: dict[str, Any]) -> None:
    """The generator makes centred routing balanced, and dense layers of active size 0.11 bpb worse than of total
    size.
    """
    centred = [
        f
        for f in findings["findings"]
        if f["family"] == "factors" and f["factor"] == "tree.routing" and f["endpoint"] == "n_eff_frac"
    ]
    assert any(f["verdict"] == "supported" and f["effect"] > 0.2 for f in centred)
    assert findings["assay"]["sensitive"]
    matches = [f for f in findings["findings"] if f["claim"] == "matches"]
    assert not any(f["verdict"] == "supported" for f in matches)
    story = {a["label"]: a["signs"] for a in findings["arms"]}
    assert "ends_balanced" in story["mirror 0, centred"]
    assert "dips" in story["mirror 0, sign"]


def test_diverged_runs_stay_and_are_listed(findings: dict[str, Any]) -> None:
    [lost] = findings["exclusions"]
    assert [lost["status"], lost["kept"]] == ["diverged", True]
    hit = [
        f
        for f in findings["findings"]
        if lost["run_id"] in f["run_ids"] and f["endpoint"] == "bpb" and f["kind"] == "contrast"
    ]
    assert hit
    for f in hit:
        assert f["effect"] > 1  # the untrained model's bpb counts
        assert abs(f["finished_only"]["effect"]) < 0.2


def test_all_views_are_there_and_missing_data_name_their_command(root: Path) -> None:
    page = (root / "out/demo/index.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<section id=", page)) == len(VIEWS) - 1  # two are empty and share one
    missing = [unescape(m) for m in re.findall(r'<li class="missing">(.*?)</li>', page)]
    assert len(missing) == 2  # the mechanism and the prune test
    assert all("ablate study run studies/" in m for m in missing)
    assert "ablate prune RUN" in missing[1]
    text = (root / "out/demo/report.md").read_text(encoding="utf-8")
    assert "Not part of this study: Does pruning follow the backward pass?; Prune test." in text
    assert 'href="http://127.0.0.1:5000/#/runs/' in page
    assert len(page.encode()) < 15e6


def test_hostile_names_stay_text(root: Path) -> None:
    folder = root / "out/demo"
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("<script>alert") == 0
    assert "&lt;script&gt;alert(1)" in page
    assert "\\u003cscript>alert(1)" in page  # in the page's data block
    for svg in (folder / "figures").glob("*.svg"):
        assert "<script" not in svg.read_text(encoding="utf-8")
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; \`x\` \$y\$" in text
    latex = (folder / "tables/balance_story.tex").read_text(encoding="utf-8")
    assert r"\$y\$" in latex
    assert "| %{z}" not in latex


def test_a_sentence_keeps_the_spaces_around_a_command() -> None:
    assert (
        parts.markdown_prose("Only a `confirm`\n study | makes *claims*.")
        == r"Only a `confirm` study \| makes \*claims\*."
    )


def test_cells_never_start_a_spreadsheet_formula() -> None:
    frame = pl.DataFrame({"arm": ["=cmd()", "+1", "@x", "plain"], "value": [-1.0, 2.0, 3.0, 4.0]})
    lines = parts.safe_csv(frame).splitlines()
    assert [line.split(",")[0] for line in lines] == ["arm", "'=cmd()", "'+1", "'@x", "plain"]
    assert lines[1].endswith("-1.0")


@pytest.mark.parametrize("address", ["javascript:alert(1)", "http://x/'onclick=", "file:///etc"])
def test_only_http_addresses_become_links(root: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="MLflow address"):
        build("demo", root, address)


def test_missing_tables_name_their_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study file .*none\.yaml' does not exist"):
        analyse("none", tmp_path)
    with pytest.raises(ConfigError, match="study name '<script>'"):
        analyse("<script>", tmp_path)
    write_study(tmp_path, usage=0)
    (tmp_path / "tables/demo/trials.parquet").unlink()
    with pytest.raises(ConfigError, match=r"ablate study run studies/demo\.yaml`, then `ablate collect demo"):
        analyse("demo", tmp_path)
    (tmp_path / "tables/demo/trials.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="cannot be read"):
        analyse("demo", tmp_path)
    (tmp_path / "results/demo/plan.json").write_text("{")
    write_study(tmp_path / "other", usage=0)
    (tmp_path / "other/results/demo/plan.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        analyse("demo", tmp_path / "other")


@pytest.mark.parametrize("table", ["trials", "history", "usage"])
def test_a_table_with_a_renamed_column_is_refused_by_name(tmp_path: Path, table: str) -> None:
    write_study(tmp_path, usage=1)
    path = tmp_path / f"tables/demo/{table}.parquet"
    old = "count" if table == "usage" else "dead_frac"
    frame = pl.read_parquet(path)
    frame.rename({old: "dead_share"}).write_parquet(path)
    with pytest.raises(ConfigError, match=rf"{table}\.parquet' has no column '{old}'"):
        analyse("demo", tmp_path)
    frame.with_columns(dead_share=pl.lit(0.5)).write_parquet(path)
    with pytest.raises(
        ConfigError, match=rf"{table}\.parquet' has the column 'dead_share', which this version does not"
    ):
        analyse("demo", tmp_path)


def test_columns_added_since_a_table_was_published_may_be_missing(tmp_path: Path) -> None:
    write_study(tmp_path, usage=1)
    path = tmp_path / "tables/demo/usage.parquet"
    pl.read_parquet(path).drop("in_norm", "out_norm").write_parquet(path)
    assert load("demo", tmp_path).usage is not None


def test_a_confirm_study_judges_its_contrasts_under_holm(tmp_path: Path) -> None:
    contrasts: list[dict[str, Any]] = [
        {"arm": "centred", "endpoint": "n_eff_frac", "claim": "higher", "margin": 0.05},
        {"arm": "centred", "endpoint": "bpb", "claim": "matches", "margin": 0.05},
        {"arm": "even", "reference": "dense_total", "endpoint": "bpb", "claim": "matches", "margin": 0.01},
    ]
    arms: dict[str, dict[str, Any]] = {"centred": {"tree.routing": "centred"}, "even": {"tree.mirror": 1.0}}
    write_study(tmp_path, seeds=tuple(range(8)), arms=arms, contrasts=contrasts, diverged=False, tune=False, usage=0)
    data = json.loads(analyse("demo", tmp_path).read_text())
    verdicts = {f: [r["verdict"] for r in data["findings"] if r["family"] == f] for f in ("confirm", "cost")}
    assert verdicts == {"confirm": ["supported"], "cost": ["supported", "refuted"]}
    assert [x["adjustment"] for x in data["families"] if x["family"] == "confirm"] == ["holm"]
    # Without the dense controls nobody knows whether the task can tell, so nothing "matches dense".
    trials = pl.read_parquet(tmp_path / "tables/demo/trials.parquet")
    trials.filter(pl.col("arm") != "dense_active").write_parquet(tmp_path / "tables/demo/trials.parquet")
    data = json.loads(analyse("demo", tmp_path).read_text())
    last = [f for f in data["findings"] if f["family"] == "cost"][-1]
    assert last["verdict"] == "inconclusive"
    assert "8 planned trials have no result yet" in last["reasons"][0], "no verdict before the study is over"
    assert "assay sensitivity" in last["reasons"][0]


def test_the_recovered_share_of_the_gap(tmp_path: Path) -> None:
    """Dense(total) is planted at 1.98 bpb, dense(active) at 2.09, trees at 2.03 and 0.012 less where routing is centred:
    about half is recovered, and a tenth of the gap more by the centred ones.
    """
    factors: dict[str, list[Any]] = {"tree.routing": ["sign", "centred"]}
    write_study(tmp_path, seeds=tuple(range(6)), factors=factors, diverged=False, tune=False, usage=0)
    data = json.loads(analyse("demo", tmp_path).read_text())
    arms = [a["arm"] for a in data["arms"] if a["kind"] == "arm"]
    assert [r["arm"] for r in data["recovered"]] == arms
    share = {r["arm"]: r["effect"] for r in data["recovered"]}
    assert share["tree.routing=centred"] - share["tree.routing=sign"] == pytest.approx(0.012 / 0.11, abs=0.05)
    known = set(pl.read_parquet(tmp_path / "tables/demo/trials.parquet")["run_id"])
    for r in data["recovered"]:
        assert r["verdict"] == "supported"
        assert r["effect"] == pytest.approx(0.54, abs=0.15)
        assert r["interval"][0] <= r["effect"] <= r["interval"][1]
        assert (r["n"], len(r["run_ids"])) == (6, 18)
        assert set(r["run_ids"]) <= known
        assert r["p"] <= r["p_adjusted"] < 0.05
    assert "recovers some" in (build("demo", tmp_path) / "report.md").read_text(encoding="utf-8")
    # The same trees where the two dense layers are hardly apart.
    path = tmp_path / "tables/demo/trials.parquet"
    poor = pl.col("arm") == "dense_active"
    pl.read_parquet(path).with_columns(bpb=pl.col("bpb") - 0.1 * poor).write_parquet(path)
    data = json.loads(analyse("demo", tmp_path).read_text())
    assert all(r["verdict"] == "inconclusive" and "cannot tell" in r["reasons"][0] for r in data["recovered"])
    assert all("cannot tell" in r["text"] for r in data["recovered"])
    text = (build("demo", tmp_path) / "report.md").read_text(encoding="utf-8")
    assert "Cannot tell: the gap" in text


def test_an_arm_in_another_activation_has_controls_of_its_own(tmp_path: Path) -> None:
    write_study(tmp_path, factors={"tree.mirror": [0.0, 1.0]}, diverged=False, tune=False, usage=0)
    path = tmp_path / "tables/demo/trials.parquet"
    trials = pl.read_parquet(path)
    plain = trials.filter(pl.col("kind") == "control")
    even = plain.with_columns(
        pl.col("arm") + " mirror=1",
        pl.lit(json.dumps({"dense": {"mirror": 1}})).alias("config"),
        pl.col("bpb") + 0.5,
        *(pl.col(c) + "-even" for c in ("trial", "run_id")),
    )
    pl.concat([trials, even]).write_parquet(path)
    data = json.loads(analyse("demo", tmp_path).read_text())
    found = {(r["arm"], r["total"], r["own_activation"]) for r in data["recovered"]}
    assert found == {
        ("tree.mirror=0.0", "dense_total", False),
        ("tree.mirror=1.0", "dense_total", False),
        ("tree.mirror=1.0", "dense_total mirror=1", True),
    }
    assert {a["label"] for a in data["arms"]} >= {"dense, equal total units, mirror 1"}
    own = [f for f in data["findings"] if f.get("reference") == "dense_total mirror=1"]
    assert [f["arm"] for f in own] == ["tree.mirror=1.0"]
    assert own[0]["effect"] < -0.3


def test_scores_of_questions_are_endpoints_and_a_table(tmp_path: Path) -> None:
    name = "qa/heldout_cloze/0shot/acc"
    arms: dict[str, dict[str, Any]] = {"good": {"tree.mirror": 1.0}}
    claim = {"arm": "good", "endpoint": name, "claim": "higher", "margin": 0.02}
    write_study(tmp_path, seeds=tuple(range(6)), arms=arms, contrasts=[claim], diverged=True, tune=False, usage=0)
    path = tmp_path / "tables/demo/trials.parquet"
    trials = pl.read_parquet(path)
    finished = pl.col("status") == "finished"
    score = 0.3 + 0.2 * (pl.col("arm") == "good") + 0.001 * pl.col("seed")
    trials = trials.with_columns(pl.when(finished).then(score).alias(name))
    trials.with_columns(
        pl.when(finished).then(0.02).alias(f"{name}/error"), pl.when(finished).then(0.25).alias(f"{name}/chance")
    ).write_parquet(path)
    data = json.loads(analyse("demo", tmp_path).read_text())
    [f] = [f for f in data["findings"] if f["family"] == "confirm"]
    # The last run of the arm diverged: it counts with chance.
    assert (f["verdict"], f["n"]) == ("supported", 6)
    assert f["effect"] == pytest.approx((5 * 0.2 + (0.25 - 0.305)) / 6)
    text = (build("demo", tmp_path) / "report.md").read_text(encoding="utf-8")
    assert "Question answering at the end of the trials" in text


def test_two_modes_are_not_averaged(tmp_path: Path) -> None:
    write_study(tmp_path, diverged=False, tune=False, usage=0)
    path = tmp_path / "tables/demo/trials.parquet"
    trials = pl.read_parquet(path)
    fell = (pl.col("arm").str.contains("centred")) & (pl.col("seed") == 1)
    trials.with_columns(
        collapse=pl.when(fell).then(1.0).otherwise(pl.col("collapse")),
        bits_lost=pl.when(fell).then(0.9).otherwise(pl.col("bits_lost")),
    ).write_parquet(path)
    data = json.loads(analyse("demo", tmp_path).read_text())
    split = [f for f in data["findings"] if f["family"] == "arms" and "centred" in f["arm"]]
    assert split
    assert all(
        f["effect"] is None and f["verdict"] == "inconclusive" and "no average" in f["reasons"][0] for f in split
    )
    assert "no average" in data["effects"]["withheld"][0]["reason"]


def test_comparison_of_two_studies(tmp_path: Path) -> None:
    write_study(tmp_path, "first", usage=0)
    write_study(tmp_path, "second", seed=8, usage=0)
    folder = compare("first", "second", tmp_path)
    data = json.loads((folder / "comparison.json").read_text())
    assert {r["label"] for r in data["arms"]} >= {"mirror 0, unit, sign", "dense, equal total units"}
    assert any(q["outcome"] == "the same" for q in data["questions"])
    assert "| choice |" in (folder / "report.md").read_text(encoding="utf-8")
    write_study(tmp_path, "third", factors={"tree.depth": [4, 5]}, controls=False, usage=0)
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare("first", "third", tmp_path)
