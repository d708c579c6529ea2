"""A published study is drawn again from what is kept beside its report, without results, tables or training."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ablate.config import ConfigError
from ablate.report.build import build
from ablate.report.published import publish, published, redraw
from ablate.results.columns import MOTION_TABLE_SCHEMA
from ablate.results.kept import pack, table, unpack
from tests.report.synthetic import write_study

SHIPPED = Path(__file__).parents[2]


def test_drawn_again_from_what_is_kept_alone(tmp_path: Path) -> None:
    write_study(tmp_path, factors={"tree.mirror": [0.0, 1.0]}, controls=False, tune=False, usage=1, diverged=False)
    none = pl.DataFrame(schema=MOTION_TABLE_SCHEMA)  # no trial recorded motion, so git does not keep it
    none.write_parquet(tmp_path / "tables/demo/motion.parquet")
    archive = publish("demo", tmp_path)
    kept = tmp_path / "kept"
    assert {p.name for p in unpack(archive, kept)} == {
        "study.yaml",
        "plan.json",
        "trials.parquet",
        "history.parquet",
        "usage.parquet",
    }
    assert published(tmp_path) == ["demo"]
    for folder in ("studies", "results", "tables"):
        shutil.rmtree(tmp_path / folder)
    for folder in ("figures", "tables", "plots"):  # git does not keep them
        shutil.rmtree(tmp_path / "reports/demo" / folder)
    assert redraw("demo", tmp_path) == []
    assert (tmp_path / "reports/demo/figures/trajectories.png").stat().st_size > 5000
    assert [p.name for p in (tmp_path / "reports").iterdir()] == ["demo"], "nothing of the drawing is left behind"

    trials = pl.read_parquet(kept / "trials.parquet")
    trials.with_columns(pl.col("bpb") + 0.1 * (pl.col("factor.tree.mirror") == 1)).write_parquet(
        kept / "trials.parquet"
    )
    pack(kept, archive)
    changed = redraw("demo", tmp_path)
    assert {"findings.json", "tables/pareto.csv", "plots/effects.csv"} <= set(changed)


@pytest.mark.parametrize("damage", ["cut", "a bit", "no archive", "no table", "empty"])
def test_a_damaged_archive_is_one_line_and_the_report_stays(tmp_path: Path, damage: str) -> None:
    write_study(tmp_path, factors={"tree.mirror": [0.0, 1.0]}, controls=False, tune=False, usage=1, diverged=False)
    archive = publish("demo", tmp_path)
    content = bytearray(archive.read_bytes())
    if damage == "no table":
        unpack(archive, tmp_path / "kept")
        (tmp_path / "kept/trials.parquet").unlink()
        pack(tmp_path / "kept", archive)
    else:
        content[len(content) // 2] ^= 16
        changed: dict[str, bytes] = {
            "cut": bytes(content[: len(content) // 2]),
            "a bit": bytes(content),
            "no archive": b"parquet" * 99,
            "empty": b"",
        }
        archive.write_bytes(changed[damage])
    before = {p: p.read_bytes() for p in archive.parent.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as refused:
        redraw("demo", tmp_path)
    assert "\n" not in str(refused.value)
    assert "trials.parquet" in str(refused.value) if damage == "no table" else repr(str(archive)) in str(refused.value)
    assert {p: p.read_bytes() for p in archive.parent.rglob("*") if p.is_file()} == before
    assert [p.name for p in (tmp_path / "reports").iterdir()] == ["demo"]


def test_no_flipped_bit_of_an_archive_is_a_traceback(tmp_path: Path) -> None:
    folder, archive = tmp_path / "files", tmp_path / "data.zip"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps({str(i): i * i for i in range(40)}))  # compressed in the archive
    (folder / "a.parquet").write_bytes(bytes(range(60)))
    pack(folder, archive)
    content = archive.read_bytes()
    refused = 0
    for at in range(8 * len(content)):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        archive.write_bytes(changed)
        try:
            unpack(archive, tmp_path / "out")
        except ConfigError:
            refused += 1
    assert refused > 2 * len(content), "what is packed is checked"


def test_the_same_files_make_the_same_archive_and_nothing_is_unpacked_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("b.parquet", "a.json"):
        (folder / name).write_bytes(name.encode() * 50)
    pack(folder, tmp_path / "one.zip")
    os.utime(folder / "a.json", (1, 1))
    pack(folder, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip", "a") as archive:
        archive.writestr("../outside.txt", "x")
    made = unpack(tmp_path / "one.zip", tmp_path / "inside")
    assert {p.parent for p in made} == {tmp_path / "inside"}
    assert not (tmp_path / "outside.txt").exists()


def test_only_what_is_read_of_usage_is_kept_and_it_gives_the_same_data(tmp_path: Path) -> None:
    slopes: dict[str, list[Any]] = {"tree.node_backward": ["own", "flat"]}
    write_study(tmp_path, factors=slopes, controls=False, tune=False, diverged=False)
    path = tmp_path / "tables/demo/usage.parquet"
    usage = pl.read_parquet(path)
    place = 7 * pl.col("index") + pl.col("layer") + pl.col("tree") + pl.col("seed")
    lost = (pl.col("step") == 300) & (pl.col("level") == pl.col("level").max()) & (place % 3 == 0)
    usage = usage.with_columns(count=pl.when(lost).then(0).otherwise(pl.col("count")))
    since = usage.with_columns(window=pl.lit("train"), count=pl.col("count") * 3)
    pl.concat([usage, since]).write_parquet(path)
    build("demo", tmp_path)
    own, report = tmp_path / "out/demo", tmp_path / "reports/demo"
    full = {p.name: p.read_bytes() for p in (*own.glob("tables/*.csv"), own / "findings.json")}
    assert "mechanism_prediction.csv" in full
    kept = pl.read_parquet(table(publish("demo", tmp_path), "usage.parquet"))
    assert {p.name: p.read_bytes() for p in (*report.glob("tables/*.csv"), report / "findings.json")} == full

    assert set(usage.columns) - set(kept.columns) == {"in_norm", "out_norm"}
    steps = {k[0]: sorted(g["step"].unique()) for k, g in kept.group_by("arm", "seed") if k[1] == 0}
    assert all(found == sorted(usage["step"].unique()) for found in steps.values()), "figures draw the first seed"
    later = kept.filter(pl.col("seed") > 0)
    assert sorted(later["step"].unique()) == [0, 25, 300], (
        "the others only foretell the last evaluation from the second"
    )
    rows = kept.select("trial", "step", "layer", "tree", "level", "index", "count", "skew", "offset")
    on = ["trial", "step", "layer", "tree", "level", "index"]
    assert rows.join(usage, on=on).select(pl.col("count") == pl.col("count_right")).to_series().all()


def test_a_published_report_names_its_pictures_unless_git_keeps_them(tmp_path: Path) -> None:
    write_study(tmp_path, factors={"tree.mirror": [0.0, 1.0]}, controls=False, tune=False, usage=1, diverged=False)
    own = build("demo", tmp_path)
    picture = "![Differences in bits per byte](figures/verdicts_bpb.png)"
    assert picture in (own / "report.md").read_text()
    before = {p: p.read_bytes() for p in own.rglob("*") if p.is_file()}
    report = publish("demo", tmp_path).parent
    redraw("demo", tmp_path)
    assert {p: p.read_bytes() for p in own.rglob("*") if p.is_file()} == before, "the user's own report is not touched"
    text = (report / "report.md").read_text()
    assert "![" not in text
    assert "Figure `figures/verdicts_bpb.png`: Differences in bits per byte." in text
    (report / ".gitignore").write_text("!figures/*.png\n")
    assert redraw("demo", tmp_path) == []
    assert picture in (report / "report.md").read_text()


def test_what_is_not_published_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="study 'mine' is not published: none is"):
        redraw("mine", tmp_path)
    with pytest.raises(ConfigError, match=r"plan\.json' does not exist"):
        publish("mine", tmp_path)


@pytest.mark.parametrize("page", ["README.md", "reports/README.md"])
def test_every_interval_and_its_verdict_in_prose_is_a_published_finding(page: str) -> None:
    text = " ".join((SHIPPED / page).read_text(encoding="utf-8").split())
    interval = r"([+-]\d+\.\d+) \(([+-]\d+\.\d+) to ([+-]\d+\.\d+)"
    claims = re.findall(interval + r"(?:\)? ?[|(,] ?(supported|refuted|inconclusive))?", text)
    assert claims
    known = [
        (f["verdict"], (f["effect"], *f["interval"]))
        for path in SHIPPED.glob("reports/*/findings.json")
        for data in [json.loads(path.read_text(encoding="utf-8"))]
        for f in data["findings"] + data["pruning"]
        if f["effect"] is not None
    ]
    for *claim, verdict in claims:
        digits = [len(value.split(".")[1]) for value in claim]
        verdicts = {
            found for found, values in known if [f"{v:+.{d}f}" for v, d in zip(values, digits, strict=True)] == claim
        }
        assert verdicts, f"{claim} stands in {page}, and in no reports/*/findings.json"
        assert not verdict or verdict in verdicts, f"{claim} is {verdict} in {page}, and {verdicts} as a finding"


ROWS = {
    "confirm": {
        "reference": "reference",
        "centred routing (control, no loss term)": "centred routing",
        "all four below marked * together": "combination",
        "frozen router *": "frozen router",
        "nodes only route *": "nodes only route",
        "even mirror *": "even mirror",
        "depth 3 instead of 6, equal units in all *": "shallow trees",
        "nonlinearity after each tree's sum": "tree placement",
        "flat gradients of the nodes": "flat node gradients",
    },
    "restored": {arm: arm for arm in ("reference", "centred routing", "combination")},
    "equal_active": {"reference": "reference", "the combination with ten trees": "small combination"},
}
"""The answer page's tables of arms, in the order they stand: what a row is called there, and its arm."""


def test_the_tables_of_arms_say_what_their_findings_say() -> None:
    lines = (SHIPPED / "reports/README.md").read_text(encoding="utf-8").splitlines()
    rows = iter([[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")])
    for study, arms in ROWS.items():
        data = json.loads((SHIPPED / f"reports/{study}/findings.json").read_text(encoding="utf-8"))
        named = {
            (f["arm"], f["endpoint"]): f
            for f in data["findings"]
            if f["family"] in {"confirm", "cost"} and f["reference"] == "reference"
        }
        means, restored = {a["arm"]: a for a in data["arms"]}, {r["arm"]: r for r in data["restored"]}
        next(row for row in rows if "n_eff_frac" in row)  # the table's head
        for label, arm in arms.items():
            name, lost, n_eff, dead, balance, verdict, bpb, cost, *more = next(rows)
            assert name == label
            assert lost == f"{means[arm]['bits_lost']['mean']:.3f}"
            assert n_eff == f"{means[arm]['n_eff_frac']['mean']:.2f}"
            assert dead == f"{means[arm]['dead_frac']['mean']:.1%}"
            if arm == "reference":
                assert bpb == f"{means[arm]['bpb']['mean']:.3f} in all"
                continue
            for endpoint, digits, text, word in (("n_eff_frac", 2, balance, verdict), ("bpb", 3, bpb, cost)):
                if (arm, endpoint) not in named:
                    assert (text, word) == ("not contrasted", "–")
                    continue
                f = named[arm, endpoint]
                effect, low, high = (f"{v:+.{digits}f}" for v in (f["effect"], *f["interval"]))
                assert (text, word) == (f"{effect} ({low} to {high})", f["verdict"])
            if more:
                assert more[0] == f"{restored[arm]['bpb_bound']:+.4f}"
                assert ("yes" in more[1]) == restored[arm]["restored"]
            else:
                assert not restored[arm]["restored"]


FRONT = [
    ("confirm", "reference"),
    ("confirm", "shallow trees"),
    ("confirm", "even mirror"),
    ("confirm", "nodes only route"),
    ("confirm", "frozen router"),
    ("restored", "combination"),
    ("equal_active", "small combination"),
    ("search-confirm", "c053"),
    ("restored", "centred routing"),
]
"""Study and arm of each row of the README's table, in its order."""


def test_the_table_of_the_readme_says_what_its_findings_say() -> None:
    lines = (SHIPPED / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| choice (study, seeds)"))
    for line, (study, arm) in zip(lines[start + 2 :], FRONT, strict=False):
        label, lost, n_eff, dead, balance, cost = (cell.strip() for cell in line.strip("|").split("|"))
        data = json.loads((SHIPPED / f"reports/{study}/findings.json").read_text(encoding="utf-8"))
        mean = next(a for a in data["arms"] if a["arm"] == arm)
        assert label.endswith(f"(`{study}`, {mean['n']})")
        assert lost == f"{mean['bits_lost']['mean']:.3f}"
        assert n_eff == f"{mean['n_eff_frac']['mean']:.2f}"
        assert dead == f"{mean['dead_frac']['mean']:.1%}"
        for family, endpoint, text in (("bits", "bits_lost", balance), ("cost", "bpb", cost)):
            if arm == "reference":
                assert text == ""
                continue
            f = next(
                f
                for f in data["findings"]
                if (f["arm"], f["reference"], f["endpoint"]) == (arm, "reference", endpoint)
                and f["family"] == ("confirm" if study == "search-confirm" else family)  # it claims both itself
            )
            effect, low, high = (f"{v:+.3f}" for v in (f["effect"], *f["interval"]))
            assert text == f"{effect} ({low} to {high})"
            assert endpoint == "bpb" or f["verdict"] == "supported"
    assert not lines[start + 2 + len(FRONT)].startswith("|")


@pytest.mark.soak
@pytest.mark.parametrize("name", published(SHIPPED))
def test_the_published_reports_follow_from_their_tables(name: str, tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    shutil.copytree(SHIPPED / "reports" / name, tmp_path / "reports" / name)
    assert redraw(name, tmp_path) == []
    findings = json.loads((tmp_path / "reports" / name / "findings.json").read_text())
    found = findings["findings"] + findings["pruning"]
    if findings["design"] == "search":  # it finds candidates and makes no claim
        assert found == []
        found = findings["search"]["candidates"]
    assert found
    assert all(f["run_ids"] for f in found)
