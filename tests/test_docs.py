"""The pages say what is so: settings that exist, examples that parse, links that lead somewhere, and a build without warnings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ablate
from ablate.config import Study, parse, schema
from ablate.study.designs import expand
from tools import api_pages, settings_page

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), ROOT / "reports/README.md"])


def test_the_settings_page_is_written_from_the_settings_that_exist() -> None:
    assert settings_page.main("--check") == 0, "run `make docs-settings`"


def test_every_setting_has_a_meaning() -> None:
    rendered = settings_page.render()
    empty = [line for line in rendered.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert empty == []


def test_the_schema_of_study_files_takes_shipped_ones_and_refuses_mistakes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(schema.schema())
    for path in [*ROOT.glob("studies/*.yaml"), *ROOT.glob("examples/*.yaml")]:
        assert not list(check.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))), path
    mistakes: list[dict[str, object]] = [
        {"facors": {}},
        {"base": {"tree": {"dept": 3}}},
        {"factors": {"tree.miror": [0]}},
        {"design": "x"},
    ]
    for wrong in mistakes:
        assert list(check.iter_errors(wrong)), wrong


@pytest.mark.parametrize(
    "block", list(re.findall(r"```yaml\n(.*?)```", settings_page.PAGE.read_text(encoding="utf-8"), re.S))
)
def test_every_study_on_the_page_is_a_valid_study(block: str) -> None:
    expand(parse(Study, yaml.safe_load(block)))


def _anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    tracked = set(
        subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    )
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    ):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        name = str(file.relative_to(ROOT))
        assert name in tracked or any(t.startswith(f"{name}/") for t in tracked), f"{target} is not in the repository"
        assert not anchor or anchor in _anchors(file), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_of_prose_fit_a_window(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    assert [line for line in text.splitlines() if len(line) > 140 and not line.startswith("|")] == []


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda p: p.name)
def test_every_page_leads_to_the_glossary(page: Path) -> None:
    assert page.name == "glossary.md" or "(glossary.md" in page.read_text(encoding="utf-8")


def test_the_citation_names_the_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == ablate.__version__
    assert f"[{ablate.__version__}] - {cited['date-released']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.soak_short
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-d",
        str(tmp_path / "trees"),
        str(ROOT / "docs"),
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    site = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "site").rglob("*.html"))
    fetched = re.findall(
        r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)|<link rel="stylesheet"[^>]+href="(https?:[^"]+)', site
    )
    assert not fetched, "a reader needs no network"


def test_the_reference_shows_examples_as_code_and_arguments_as_a_list() -> None:
    text = "Return |x| * 2.\n\nArgs:\n    x: a value,\n        or two.\n\n>>> f(1)\n2\n"
    shown = "Return |x| \\* 2.\n\nArgs:\n- x: a value,\n  or two.\n\n```python\n>>> f(1)\n2\n```"
    assert api_pages.markdown(text) == shown
