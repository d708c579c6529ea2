"""The report of a search, over everything that a search can be, and as a reader's browser shows it."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]

from ablate.report.build import build
from ablate.report.context import LEADING
from tests.browser import chromium
from tests.report.synthetic_search import CONDITIONAL, FACTORS, write_search
from tests.report.test_page import opened
from tests.report.test_report import EVIL, files

TWO = ("bpb", "n_eff_frac")
DEPTH = {"tree.depth": FACTORS["tree.depth"]}
CASES: dict[str, dict[str, Any]] = {
    "one objective, one factor": {"objectives": ("bpb",), "factors": DEPTH, "count": 15},
    "one objective, matched": {"objectives": ("bpb",), "match": "total_units", "count": 15},
    "two objectives, matched, conditional": {
        "objectives": TWO,
        "match": "active_units",
        "factors": FACTORS | CONDITIONAL,
        "count": 15,
    },
    "three objectives, conditional": {
        "objectives": (*TWO, "dead_frac"),
        "factors": FACTORS | CONDITIONAL,
        "count": 15,
    },
    "one seed, no finalists": {"objectives": TWO, "race": (0,), "finalists": 0, "count": 15},
    "three candidates": {"objectives": TWO, "count": 3, "finalists": 1, "diverged": "none"},
    "one candidate": {"objectives": ("bpb",), "count": 1, "finalists": 0, "diverged": "none"},
    "all diverged": {"objectives": TWO, "count": 4, "diverged": "all"},
    "no notes of the engine": {"objectives": ("n_eff_frac",), "with_plan": False, "count": 15},
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_search_has_a_report(tmp_path: Path, case: str) -> None:
    write_search(tmp_path, **CASES[case])
    page = (build("hunt", tmp_path) / "index.html").read_text(encoding="utf-8")
    text = (tmp_path / "out/hunt/report.md").read_text(encoding="utf-8")
    assert "No comparison could be made" not in page
    assert "two seeds" not in page
    sections = re.findall(r'<section id="([^"]+)"', page)
    assert sections[0] == "candidates"
    assert "verdicts" not in sections
    assert ("front" in sections) == (len(CASES[case]["objectives"]) > 1 and case != "all diverged")
    missing = [unescape(m) for m in re.findall(r'<p class="missing">(.*?)</p>', page)]
    assert len(missing) == (case == "all diverged")
    assert "The search tried" in text.split("##")[1]
    if case != "all diverged":
        assert "ablate study promote hunt" in text.split("##")[1]


@pytest.mark.soak
def test_two_hundred_candidates(tmp_path: Path) -> None:
    write_search(tmp_path, count=200, factors=FACTORS | CONDITIONAL)
    page = (build("hunt", tmp_path) / "index.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 12e6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search_page")
    write_search(root, factors=FACTORS | CONDITIONAL, match="total_units", title=EVIL, count=25)
    build("hunt", root)
    return root


def test_candidates_have_short_names_and_columns(root: Path) -> None:
    table = (root / "out/hunt/tables/candidates.csv").read_text(encoding="utf-8").splitlines()
    assert table[0].startswith("arm,rank,set tree.depth,set tree.leaf_width,set tree.mirror")
    assert "set tree.trees" in table[0]
    assert len(table) == 26
    assert all(re.match(r"c\d{3},", line) for line in table[1:])


def test_the_front_and_every_objective_are_named(root: Path) -> None:
    found = json.loads((root / "out/hunt/findings.json").read_text(encoding="utf-8"))["search"]
    picture = (root / "out/hunt/figures/front.svg").read_text(encoding="utf-8")
    for r in (r for r in found["candidates"] if r["on_front"]):
        named = 1 + (r["rank"] <= LEADING)  # at its mark, and in the legend
        assert picture.count(f">{r['arm']}</text>") == named
    text = (root / "out/hunt/report.md").read_text(encoding="utf-8").replace("\\_", "_")
    for o in found["objectives"]:
        assert f"The best {o['objective']} was reached by " in text


def test_the_first_screen_says_what_the_first_choice_is_and_what_it_gains(root: Path) -> None:
    search = json.loads((root / "out/hunt/findings.json").read_text(encoding="utf-8"))["search"]
    screen = (root / "out/hunt/report.md").read_text(encoding="utf-8").split("\n## ")[0].replace("\\_", "_")
    first = search["candidates"][0]
    assert f"- First choice: {first['arm']}: " in screen
    assert re.search(r"with depth .*; 40 of 1,276 units active \(3\.1%\)\.\n", screen)
    assert "- Gain: Against the base's settings" in screen
    assert "- Unknown: A search finds candidates" in screen


def test_the_same_tables_give_the_same_bytes(root: Path) -> None:
    before = files(root / "out/hunt")
    (root / "out/hunt/findings.json").unlink()
    build("hunt", root)
    assert files(root / "out/hunt") == before


def test_the_findings_are_documented(root: Path) -> None:
    found = json.loads((root / "out/hunt/findings.json").read_text(encoding="utf-8"))
    documented = Path("docs/findings.md").read_text(encoding="utf-8")
    search = found["search"]
    parts = [search, *(search[k][0] for k in ("objectives", "candidates", "finalists", "history", "surrogate"))]
    parts += [search["dependence"][0], search["maps"][0], found["importance"][0]]
    assert [k for part in parts for k in part if f"`{k}`" not in documented] == []


@pytest.mark.browser
@pytest.mark.parametrize("size", ["desktop", "phone", "no scripts"])
def test_the_page_in_a_browser(root: Path, size: str) -> None:
    path = root / "out/hunt/index.html"
    with chromium() as browser:
        page, errors, requests = opened(browser, path, size)
        assert errors == []
        assert requests == [path.as_uri()]
        assert page.locator("section").first.get_attribute("id") == "candidates"
        if size == "no scripts":
            assert page.locator("figure .still svg").first.is_visible()
        else:
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        if size == "desktop":
            found = Axe().run(page).response["violations"]
            assert [(v["id"], v["nodes"][0]["html"][:80]) for v in found] == []
        page.context.close()
