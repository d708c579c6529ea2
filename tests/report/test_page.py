"""The page as a reader meets it: headless Chromium, desktop and phone, light and dark, with and without scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page

from ablate.report.build import build
from ablate.report.views import VIEWS
from tests.browser import chromium
from tests.report.synthetic import write_study

pytestmark = pytest.mark.browser
NAME = '<script>document.title="owned"</script>'
SIZES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "no scripts": {"viewport": {"width": 1280, "height": 900}, "java_script_enabled": False},
}


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    factors: dict[str, list[Any]] = {"tree.mirror": [0.0, 1.0], "tree.routing": ["sign", "centred"]}
    write_study(root, title=NAME, factors=factors, arms={NAME: {"tree.router": "frozen"}})
    return build("demo", root) / "index.html"


@pytest.fixture(scope="module")
def browser() -> Any:
    with chromium() as found:
        yield found


def opened(browser: Browser, path: Path, size: str) -> tuple[Page, list[str], list[str]]:
    """The page scrolled through once; console and page errors; requests."""
    page = browser.new_context(**SIZES[size]).new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type in {"error", "warning"} else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto(path.as_uri())
    if size != "no scripts":
        for plot in page.locator("figure:has(.plot), .widget .plot").all():
            plot.scroll_into_view_if_needed()
            plot.locator(".main-svg").first.wait_for(state="attached")
    return page, errors, requests


@pytest.mark.parametrize("size", SIZES)
def test_no_error_no_request_and_nothing_wider_than_the_window(browser: Browser, page_path: Path, size: str) -> None:
    page, errors, requests = opened(browser, page_path, size)
    assert errors == []
    assert requests == [page_path.as_uri()]
    assert page.title() == f"{NAME} · ablate"
    assert page.locator("section").count() == len(VIEWS) - 1  # two sections have no data and share one
    if size == "no scripts":
        assert page.locator("figure .still svg").first.is_visible()
        assert not page.locator(".widget").first.is_visible()
    else:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.locator(".plot .main-svg").first.is_visible()
    page.context.close()


@pytest.mark.parametrize("size", ["desktop", pytest.param("dark", marks=pytest.mark.soak)])
def test_axe_finds_no_violation(browser: Browser, page_path: Path, size: str) -> None:
    page, _, _ = opened(browser, page_path, size)
    found = Axe().run(page).response["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"][:80]) for v in found] == []
    page.context.close()


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_the_command_to_run_next_is_read_whole(browser: Browser, page_path: Path, size: str) -> None:
    page, _, _ = opened(browser, page_path, size)
    command = page.locator(".answer pre")
    command.locator("code").evaluate("node => node.append(' && ablate study run studies/a-longer-name.yaml'.repeat(4))")
    assert command.evaluate("node => node.scrollWidth <= node.clientWidth")
    page.context.close()


def test_widgets_answer_to_the_keyboard(browser: Browser, page_path: Path) -> None:
    page, errors, _ = opened(browser, page_path, "desktop")
    page.get_by_role("slider", name="Evaluation").focus()
    end = page.locator("[data-widget=usage] output").inner_text()
    page.keyboard.press("Home")
    start = page.locator("[data-widget=usage] output").inner_text()
    assert [start, end] == ["step 0", "step 300"]
    rows = page.locator("[data-widget=runs] tbody tr")
    everything = rows.count()
    page.get_by_label("Filter runs").fill("dense_total control")
    page.get_by_label("Filter runs").fill("diverged")
    assert rows.count() == 1 < everything
    page.get_by_label("Filter runs").fill("frozen")
    for box in page.locator("[data-widget=runs] tbody input").all()[:2]:
        box.focus()
        page.keyboard.press("Space")
    assert "init_seed" in page.locator("[data-widget=runs]").inner_text()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    assert errors == []
    page.context.close()


def test_print_shows_figures_not_widgets(browser: Browser, page_path: Path) -> None:
    page, _, _ = opened(browser, page_path, "desktop")
    page.emulate_media(media="print")
    assert page.locator("figure .still svg").first.is_visible()
    assert not page.locator(".plot").first.is_visible()
    assert not page.locator(".widget").first.is_visible()
    page.context.close()
