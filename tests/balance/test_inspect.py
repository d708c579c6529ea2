from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console, RenderableType

from ablate.balance.inspect import page, terminal
from ablate.balance.usage import rows
from ablate.config import ConfigError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def table() -> pl.DataFrame:
    """Two layers of two trees with eight leaves; tree 1 of layer 0 sends its tokens to leaves 6 (300) and 7 (100)."""
    counts = np.full((2, 2, 8), 50)
    counts[0, 1] = [0, 0, 0, 0, 0, 0, 300, 100]
    skew = np.full((2, 2, 7), 0.05)
    skew[0, 1] = [np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, -0.42]
    uniform = np.full((2, 2, 8), 50)
    return pl.concat([rows(0, "held_out", uniform), rows(40, "held_out", counts, skew=skew), rows(40, "train", counts)])


def text(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_terminal_draws_the_worst_tree_of_each_layer() -> None:
    drawn = text(terminal(table()))
    assert "layer 0, tree 1, step 40  effective leaves 1.8 of 8, dead 75%, max load 6.0x the mean" in drawn
    lines = drawn.splitlines()
    assert any("0.0%" in line and "4 leaves below, never reached" in line for line in lines)
    assert any("75.0%" in line and "leaf 6" in line for line in lines)
    assert any("100.0%" in line and "skew -0.42" in line for line in lines)
    assert "layer 1, tree 0" in drawn
    assert "skew +0.05" in drawn


def test_step_tree_and_levels_are_chosen() -> None:
    drawn = text(terminal(table(), step=0, tree=1, levels=1))
    assert "layer 0, tree 1, step 0  effective leaves 8.0 of 8, dead 0%" in drawn
    assert drawn.count("4 leaves below, 4 alive") == 4
    assert "leaf 0" not in drawn
    with pytest.raises(ConfigError, match=r"step is 7: the run was evaluated at 0, 40"):
        terminal(table(), step=7)
    with pytest.raises(ConfigError, match=r"tree is 2: .* 0 to 1"):
        terminal(table(), tree=2)
    with pytest.raises(ConfigError, match="no usage table"):
        terminal(table().clear())


def test_trees_without_nodes_are_drawn() -> None:
    frame = rows(0, "held_out", np.full((1, 2, 1), 100))
    assert "effective leaves 1.0 of 1" in text(terminal(frame))
    assert "<svg" in page(frame, "x")


def test_the_page_is_self_contained_and_escapes_its_title() -> None:
    html = page(table(), "</title><script>alert(1)</script>")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in html
    payload = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)[0])
    assert payload["steps"] == [0, 40]
    assert payload["counts"][1][0][1] == [0, 0, 0, 0, 0, 0, 300, 100]
    assert payload["skew"][1][0][1] == [None] * 6 + [-0.42]
    assert "innerHTML" not in script


def test_a_long_run_is_thinned_to_its_first_last_and_between() -> None:
    frame = pl.concat([rows(step, "held_out", np.full((1, 1, 2), 50)) for step in range(200)])
    payload = json.loads(re.findall(r'id="data">(.*?)</script>', page(frame, "long"))[0])
    assert len(payload["steps"]) == 60
    assert payload["steps"][0] == 0
    assert payload["steps"][-1] == 199


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.html").write_text(page(table(), "run <b>1</b>"), encoding="utf-8")
    messages: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view: Any = browser.new_page()
        view.on("console", lambda message: messages.append(message.text))
        view.on("pageerror", lambda error: messages.append(str(error)))
        view.on("request", lambda request: requests.append(request.url))
        view.goto((tmp_path / "page.html").as_uri())
        assert view.text_content("h1") == "run <b>1</b>"
        assert view.text_content("#n-eff") == "8.0 of 8"
        view.select_option("#tree", "1")
        assert view.text_content("#n-eff") == "1.8 of 8"
        assert view.text_content("#dead") == "75%"
        assert view.locator("#drawing .edge").count() == 14
        assert view.locator("#drawing .edge.unused").count() == 10  # used: one, one and two
        widths = [float(e.get_attribute("stroke-width")) for e in view.locator("#drawing .edge:not(.unused)").all()]
        assert widths[-2] == pytest.approx(3 * widths[-1])
        view.select_option("#levels", "1")
        assert view.locator("#drawing .edge").count() == 2
        view.locator("#step").press("ArrowLeft")
        assert view.text_content("#step-value") == "0"
        assert view.text_content("#n-eff") == "8.0 of 8"
        browser.close()
    assert messages == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
