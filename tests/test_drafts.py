"""New study files: commented ones that can be planned, and copies with other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ablate.config import ConfigError, load_study, schema
from ablate.config.drafts import DESIGNS, Design, changed_study, new_study
from ablate.study.designs import expand


@pytest.mark.parametrize("design", DESIGNS)
def test_a_new_study_can_be_planned(design: Design, tmp_path: Path) -> None:
    path = new_study("mine", design, tmp_path)
    study = load_study(path)
    assert (study.name, study.design) == ("mine", design)
    assert expand(study).arms or design == "search"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=study.schema.json\n")
    assert json.loads((path.parent / schema.FILE).read_text(encoding="utf-8")) == schema.schema()
    with pytest.raises(ConfigError, match="exists: give another name"):
        new_study("mine", design, tmp_path)
    assert path.read_text(encoding="utf-8") == text


def test_other_settings_make_another_study(tmp_path: Path) -> None:
    old = new_study("mine", "factorial", tmp_path)
    before = old.read_bytes()
    settings = ["train.steps=50", "seeds=[7, 8]", "corpus.source=files", "corpus.path=texts/*.txt", "tree={depth: 3}"]
    path = changed_study(old, settings)
    assert path.parent == old.parent
    study = load_study(path)
    assert study.name == path.stem
    assert study.name.startswith("mine-train.steps-50-seeds-7-8")
    assert len(study.name) <= 64
    trial = study.trial({})
    assert (trial.train.steps, study.seeds, trial.corpus.path) == (50, [7, 8], "texts/*.txt")
    assert (trial.tree.depth, trial.tree.trees) == (3, 4)
    assert trial.train.lr == load_study(old).trial({}).train.lr
    assert old.read_bytes() == before
    assert changed_study(old, settings) == path, "the same settings are the same study"
    assert changed_study(old, ["train.steps=50"], "short").stem == "short"
    with pytest.raises(ConfigError, match=r"short\.yaml' exists: give another name"):
        changed_study(old, ["train.steps=51"], "short")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps", "set is 'train.steps': key=value is expected"),
        ("=5", "set is '=5': key=value is expected"),
        ("train.stps=5", "train.stps: unknown setting; allowed here: steps"),
        ("train.steps=0", "train.steps is 0"),
        ("train.steps=[", "set 'train.steps=.' is not YAML"),
        ("colour=red", "colour: unknown setting"),
    ],
)
def test_a_wrong_setting_is_one_line_and_writes_nothing(setting: str, message: str, tmp_path: Path) -> None:
    old = new_study("mine", "factorial", tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        changed_study(old, [setting])
    assert "\n" not in str(caught.value)
    assert {p.name for p in old.parent.iterdir()} == {"mine.yaml", schema.FILE}
