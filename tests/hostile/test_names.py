"""Names that people choose for arms, studies, files and folders reach stores, paths and drawings through one escape each."""

from __future__ import annotations

import io
import posixpath
import re
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mlflow.tracking import MlflowClient
from rich.console import Console
from sqlalchemy.engine import make_url

from ablate.balance import inspect as inspection
from ablate.cli.common import number, study_name, table_of
from ablate.config import ConfigError, Study
from ablate.report.draw import wrap
from ablate.results.layout import Layout
from ablate.study.address import default_storage, sqlite_url
from ablate.study.designs import expand
from ablate.study.job import Event
from ablate.study.progress import Display
from ablate.tracking.store import LONGEST_NAME, batches, default_uri, flat, metric_name, prepare_store

NAMES = [
    "GELU/../ReLU", "a//b", "lr+", "lr*", "[x]", "what?", "a%20b", "..", ".", "a b", "a  b", " a", "/etc/passwd", "a/",
    "[bold]x[/bold]", "<script>", "$x^2$", "a\\b", "a&b", "größe", "🌳", "a" * 300, "a" * 299 + "b", "-x", "_x", "=1+1",
    "a.b", "a:b", "a'b", 'a"b', "{x}", "`x`", "|", "#", "~",
]  # fmt: skip
FOLDERS = ["a%20b", "what?", "[x]", "a b", "a#b", "größe", "100%", "a&b=c", "a:b@c", "%", "*", "a'b", "$HOME", "~"]
TEXT = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(NAMES)


def accepted(key: str) -> bool:
    """MLflow's rule for names of parameters and metrics."""
    path = posixpath.normpath(key)
    return bool(re.fullmatch(r"[/\w.\- :]*", key)) and path == key and not path.startswith(("..", "/")) and path != "."


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_any_arm_has_parameters_that_mlflow_takes(arm: str) -> None:
    key = metric_name(f"arms.{arm}.tree.depth")
    assert accepted(key)
    assert len(key) <= LONGEST_NAME
    assert metric_name(f"arms.{arm}.tree.depth") == key


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, unique=True, max_size=12))
def test_arms_that_differ_have_parameters_that_differ(arms: list[str]) -> None:
    assert len({metric_name(f"arms.{arm}.tree.depth") for arm in arms}) == len(arms)


@pytest.mark.parametrize(
    "key", ["tree.depth", "evaluation/qa/x/0shot/acc", "layer0/n_eff", "arms.a b.tree.depth", "ü:x"]
)
def test_names_that_mlflow_takes_stay_as_they_are(key: str) -> None:
    assert metric_name(key) == key


def test_mlflow_keeps_every_parameter_of_arms_with_such_names(tmp_path: Path) -> None:
    study = Study.model_validate(
        {"name": "s", "factors": {"tree.mirror": [0, 1]}, "arms": {name: {"tree.depth": 3} for name in NAMES}}
    )
    client = prepare_store(default_uri(tmp_path))
    run = client.create_run("0").info.run_id
    given_params = flat(study.model_dump(mode="json"))
    for batch in batches(given_params):
        client.log_batch(run, params=batch)
    assert len(client.get_run(run).data.params) == len(given_params)


@pytest.mark.parametrize("name", ["", " ", "\n", "a\nb", "\u202eabc", "a\u200bb", "a\tb", "\u00a0"])
def test_an_arm_whose_name_would_not_be_seen_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name: printable characters in one line are expected"):
        Study.model_validate({"name": "s", "factors": {"tree.mirror": [0]}, "arms": {name: {"tree.depth": 3}}})


# --- folders


@pytest.mark.parametrize("folder", FOLDERS)
def test_databases_lie_in_the_projects_own_folder(folder: str, tmp_path: Path) -> None:
    root = tmp_path / folder
    root.mkdir()
    for url, file in ((default_storage(root), "optuna.db"), (default_uri(root), "mlflow.db")):
        assert make_url(url).database == str(root / "state" / file)
        assert not make_url(url).query


@pytest.mark.parametrize("folder", ["a%20b", "what?", "a#b", "[x]"])
def test_mlflow_keeps_its_database_in_such_a_folder(folder: str, tmp_path: Path, fresh_store: Path) -> None:
    root = tmp_path / folder
    (root / "state").mkdir(parents=True)
    (root / "state" / "mlflow.db").write_bytes(fresh_store.read_bytes())
    prepare_store(default_uri(root)).create_experiment("x")
    assert MlflowClient(default_uri(root)).get_experiment_by_name("x") is not None
    assert [p.name for p in tmp_path.iterdir()] == [folder]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30))
def test_any_folder_comes_back_from_its_url(folder: str) -> None:
    file = Path("/tmp") / folder / "x.db"
    assert make_url(sqlite_url(file)).database == str(file.resolve())


@pytest.mark.parametrize("folder", FOLDERS)
def test_tables_are_read_in_a_folder_whose_name_is_a_pattern(folder: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / folder, "s")
    layout.results.mkdir(parents=True)
    pl.DataFrame({"window": ["other"]}).write_parquet(layout.usage("x"))
    with pytest.raises(ConfigError, match="the run has no usage table"):
        inspection.load(layout.usage("x"))


# --- what is typed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("studies/tiny.yaml", "is a file: a study's name is expected: tiny"),
        ("tiny.yml", "is a file: a study's name is expected: tiny"),
        ("../../etc", "is no study's name"),
        ("..", "is no study's name"),
        ("a/b", "is no study's name"),
        ("", "is no study's name"),
        ("a b", "is no study's name"),
        ("a\nb", "is no study's name"),
        ("[x]", "is no study's name"),
        ("é", "is no study's name"),
        ("a\udce9", "is no study's name"),
        ("x" * 65, "is no study's name"),
        ("tiny\n", "is no study's name"),
    ],
)
def test_what_is_no_studys_name_is_said(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        study_name(name)
    assert message in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["9" * 5000, "-1", "1.5", "", "x", "²", "1e3"])
def test_a_number_of_shots_that_is_none_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^shots is "):
        number(text)


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" * 9])
def test_a_usage_table_that_is_none_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "u.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^usage table .* cannot be used"):
        inspection.load(tmp_path / "u.parquet")


# --- the terminal


@pytest.mark.parametrize("name", [n for n in NAMES if len(n) < 40])
def test_a_table_shows_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table_of(name, ["arm", ""], [[name, "1"]])
    shown = capsys.readouterr().out
    assert shown.count(name.strip()) >= 2


@settings(max_examples=50, deadline=None)
@given(TEXT)
def test_any_cell_is_printed(cell: str) -> None:
    table_of(cell[:8], ["a"], [[cell]])


@pytest.mark.parametrize("name", ["[/x]", "[x]", "[bold]b[/bold]", "[red", ":smile:", "[link=file:///]x[/link]"])
def test_a_running_arm_is_shown_as_it_is(name: str) -> None:
    study = Study.model_validate({"name": "s", "factors": {"tree.mirror": [0]}, "arms": {name: {"tree.depth": 3}}})
    file = io.StringIO()
    screen = Console(file=file, force_terminal=True, width=120, color_system=None)
    with Display(study, 1, screen) as progress:
        progress.start(expand(study), 1, {name: {0: [1.5, 1.5]}})
        progress.tell(Event(worker="w", kind="started", arm=name, seed=0, step=3, total=9))
        progress.tell(Event(worker="w", kind="failed", arm=name, seed=1, message=f"{name} broke"))
    shown = file.getvalue()
    assert shown.count(name) >= 3


def test_a_name_that_begins_with_an_underscore_is_in_the_legend() -> None:
    figure = Figure()
    handles = [Line2D([], [], label=wrap(name)) for name in ("_x", "y")]
    assert [text.get_text().strip() for text in figure.legend(handles=handles).get_texts()] == ["_x", "y"]


def test_a_cell_cannot_colour_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table_of("t", ["a"], [["\x1b[31mred\x07"]])
    assert "\x1b[31m" not in capsys.readouterr().out
    assert Console(file=io.StringIO()).file
