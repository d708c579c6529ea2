from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from ablate.config import PRESETS, ConfigError, Preset, Study, Trial, load_study, parse

GOOD = {"name": "s", "factors": {"tree.mirror": [0, 1]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factr": 1}, "factr: unknown setting; allowed here: name, title,"),
        ({"factors": {"tree.miror": [0, 1]}}, "factor 'tree.miror' is unknown: tree has trees, depth,"),
        ({"factors": {"model_d": [0]}}, "factor 'model_d' is unknown: it starts with one of tree., model., dense., moe., train."),
        ({"factors": {"tree.mirror": [0, 0]}}, "factors.tree.mirror: levels is [0, 0]: a level is listed twice"),
        ({"factors": {"tree.mirror": {}}}, "factors.tree.mirror: levels is missing: a factor has either levels or a range"),
        ({"base": {"tree": {"depth": 77}}}, "base.tree.depth is 77: input should be less than or equal to 14"),
        ({"base": {"tree": {"dept": 7}}}, "base.tree.dept: unknown setting; allowed here: trees, depth,"),
        ({"base": {"tree": 7}}, "base.tree is 7: a section with its settings is expected"),
        ({"base": {"model": {"d_model": 130}}}, "base.model: d_model is 130: it must be a multiple of 2 x heads = 8"),
        ({"base": {"train": {"batch_size": 6, "accumulate": 4}}}, "batch_size is 6: it must be a multiple of accumulate x devices = 4"),
        ({"base": {"train": {"lr": -1}}}, "base.train.lr is -1: input should be greater than 0"),
        ({"base": {"train": {"lr": float("nan")}}}, "base.train.lr is nan: "),
        ({"base": {"train": {"eval_tokens": 100}}}, "train.eval_tokens is 100: depth 6 needs at least 64 x leaves = 4096"),
        (
            {"base": {"tree": {"node_backward": "flip", "placement": "tree"}}},
            "node_backward is 'flip': it needs placement 'unit' and node_output on",
        ),
        ({"base": {"corpus": {"source": "files"}}}, "path is missing: source 'files' needs a directory, file or glob"),
        ({"base": {"corpus": {"source": "web"}}}, "base.corpus.source is 'web': input should be 'stdlib', 'files' or 'hub'"),
        ({"base": {"corpus": {"tokenizer_file": "x"}}}, "tokenizer_file is 'x': it is given with tokenizer 'file', and only then"),
        (
            {"design": "search", "budget": {"trials": 3}, "pruner": "median", "objectives": ["bpb", "n_eff_frac"]},
            "pruner is 'median': with 2 objectives",
        ),
        ({"pruner": "median"}, "pruner is 'median': only design 'search' prunes"),
        ({"design": "search"}, "budget is missing: design 'search' needs"),
        ({"factors": {"train.lr": {"range": {"low": 1, "high": 2}}}}, "factors.train.lr.range: design 'factorial' needs levels"),
        ({"factors": {"train.lr": {"range": {"low": 0, "high": 2, "log": True}}}}, "low is 0.0: a log range needs it above 0"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]: 1 is listed twice"),
        ({"tune": {"lr": [0.1, 0.2], "seeds": [1, 9]}}, "tune.seeds is [1, 9]: they must differ from seeds"),
        ({"design": "confirm"}, "contrasts is missing: design 'confirm' needs arms and contrasts"),
        ({"name": "../up"}, "name is '../up': string should match pattern"),
        ({"name": "<script>"}, "name is '<script>': string should match pattern"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)  # fmt: skip
def test_bad_settings_are_one_line_that_names_key_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(Study, {**GOOD, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: a mapping with name, factors"),
        (b"- a\n- b\n", "is a list: a mapping with name, factors"),
        (b"\x00\xff\xfe\x9c", "is not text in UTF-8: byte 0xff at line 1"),
        (b"name: [unclosed\n", "is not YAML at line"),
        (b"\x07bell: 1", "is not YAML"),
        (b"!!python/object:os.system {}\n", "is not YAML"),
    ],
)
def test_files_that_are_no_study(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_study(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").touch()
    with pytest.raises(ConfigError, match=r"does not exist; studies beside it: other\.yaml"):
        load_study(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study(tmp_path)


def test_name_defaults_to_the_file_and_presets_are_bases(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: small\nbase: {train: {steps: 7}}\nfactors: {tree.mirror: [0, 1]}\n")
    study = load_study(file)
    trial = study.trial({"tree.mirror": 1}, seed=4)
    assert study.name == "mine"
    assert (trial.model.d_model, trial.train.steps, trial.tree.mirror, trial.init_seed, trial.data_seed) == (
        384,
        7,
        1,
        4,
        4,
    )


def test_every_preset_can_be_named_in_a_study() -> None:
    assert get_args(Preset) == tuple(PRESETS)


def test_hash_is_of_the_content() -> None:
    assert Trial().hash() == Trial(tree=Trial().tree).hash()
    assert Trial().hash() != Trial(init_seed=1).hash()
    assert Trial.model_validate_json(Trial().model_dump_json()) == Trial()


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("studies/*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_are_valid(path: Path) -> None:
    assert load_study(path).name == path.stem
