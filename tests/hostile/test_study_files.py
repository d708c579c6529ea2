"""Study files as people and machines write them: accepted, or one line and nothing built."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ablate.config import ConfigError, Section, Study, Trial, load_study, parse
from ablate.config.settings import Corpus, Dense, Mixture, Model, Questions, Train, Tree
from ablate.config.text import DEEPEST, load_json, load_yaml
from ablate.model.memory import check_memory, least_bytes, machine_bytes
from ablate.model.size import step_memory
from ablate.study.designs import expand
from ablate.study.forecast import forecast
from ablate.study.records import plan_document
from ablate.study.runner import run_study
from ablate.study.samplers import key_of
from ablate.study.space import Space

TRIAL = (Corpus, Model, Tree, Dense, Mixture, Train, Questions, Trial, Study)
BASE = """\
base:
  corpus: {max_documents: 60, vocab_size: 512}
  model: {d_model: 32, blocks: 1, heads: 2, context: 64}
  tree: {trees: 2, depth: 3, leaf_width: 2}
  train: {steps: 2, batch_size: 8, eval_every: 10, eval_tokens: 8192}
"""
GRID = "factors: {tree.mirror: [0, 1]}\n"


def load(folder: Path, text: str) -> Study:
    file = folder / "s.yaml"
    file.write_text(text, encoding="utf-8")
    return load_study(file)


def refused(folder: Path, text: str) -> str:
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        expand(load(folder, text))
    assert time.process_time() - began < 20
    told = str(error.value)
    assert len(told) < 500
    assert told.isprintable()
    return told


# --- numbers that cannot be carried on


def numbers(kind: type[Section]) -> list[str]:
    found = []
    for name, field in kind.model_fields.items():
        left, leaves = [field.annotation], set[Any]()
        while left:
            annotation = left.pop()
            leaves.add(annotation)
            left += get_args(annotation)
        if leaves & {int, float} and not any(isinstance(t, type) and issubclass(t, Section) for t in leaves):
            found.append(name)
    return found


@pytest.mark.parametrize("kind", TRIAL, ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    "value", [float("inf"), float("-inf"), float("nan"), True, 10**400, -(10**400)], ids=lambda v: str(v)[:9]
)
def test_no_number_of_a_setting_is_infinite_a_switch_or_beyond_all_bounds(kind: type[Section], value: Any) -> None:
    # A field of several numbers refuses the bare one too.
    for name in set(numbers(kind)) - {"base", "arms", "enqueue"}:
        for given_value in (value, [value], [value, 0.5]):
            with pytest.raises(ConfigError) as error:
                parse(
                    kind,
                    {"name": "s", **({"factors": {"tree.mirror": [0]}} if kind is Study else {}), name: given_value},
                )
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("margin: .inf", "margin is inf: input should be a finite number"),
        ("min_effect_n_eff: .nan", "min_effect_n_eff is nan"),
        ("budget: {hours: .inf}", "budget.hours is inf: input should be a finite number"),
        ("budget: {trials: 1.5}", "budget.trials is 1.5"),
        ("seeds: [true]", "seeds is [True]: a number is expected, not true or false"),
        ("seeds: [4294967296]", "seeds.0 is 4294967296: input should be less than 4294967296"),
        ("seeds: [-1]", "seeds.0 is -1"),
        ("tune: {lr: [0.1, 0.1], seeds: [9]}", "tune.lr is [0.1, 0.1]: 0.1 is listed twice"),
        ("tune: {lr: [0.1, 0.2], seeds: [9, 9]}", "tune.seeds is [9, 9]: 9 is listed twice"),
        ("objectives: [bpb, bpb]", "objectives is ['bpb', 'bpb']: 'bpb' is listed twice"),
        ("arms: {a: {tree.mirror: .nan}}", "arms.a.tree.mirror"),
    ],
)
def test_settings_of_a_study_that_cannot_be_carried_on(line: str, told: str, tmp_path: Path) -> None:
    assert told in refused(tmp_path, BASE + GRID + line + "\n")


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ("grad_clip: .inf", "base.train.grad_clip is inf"),
        ("load_loss: .inf", "base.train.load_loss is inf"),
        ("steps: true", "base.train.steps is True: a number is expected, not true or false"),
        ("batch_size: 100000000000000000000000000000000", "base.train.batch_size is 100000000000000000000000000000000"),
        ("strategy: deepspeed", "base.train.strategy is 'deepspeed'"),
    ],
)
def test_settings_of_training_that_cannot_be_carried_on(train: str, told: str, tmp_path: Path) -> None:
    assert told in refused(tmp_path, f"base: {{train: {{{train}}}}}\n{GRID}")


# --- one value in several spellings


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        ("tree.mirror: [0, 0.0]", "0 and 0.0 are one value"),
        ("tree.mirror: [0, -0.0]", "0 and -0.0 are one value"),
        ('tree.mirror: [1, "1"]', "1 and '1' are one value"),
        ("train.lr: [1e-3, 0.001]", "'1e-3' and 0.001 are one value"),
        ("tree.depth: [2, 2.0]", "2 and 2.0 are one value"),
        ('tree.bias: ["yes", true]', "'yes' and True are one value"),
        ("tree.node_mirror: [null, null]", "a level is listed twice"),
        ("tree.mirror: [0, true]", "factors.tree.mirror is True: a number is expected, not true or false"),
        ("tree.depth: [2, 2.5]", "factors.tree.depth is 2.5"),
        ("tree.depth: [2, 77]", "factors.tree.depth is 77"),
    ],
)
@pytest.mark.parametrize("design", ["factorial", "one_at_a_time", "search"])
def test_a_level_in_two_spellings_or_of_another_kind_is_refused(
    design: str, factor: str, told: str, tmp_path: Path
) -> None:
    text = f"{BASE}design: {design}\nbudget: {{trials: 9}}\nfinalists: {{count: 0}}\n" + f"factors: {{{factor}}}\n"
    text = text if design == "search" else text.replace("finalists: {count: 0}\n", "")
    assert told in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("when", "told"),
    [
        ("{tree.depth: .nan}", "factors.tree.mirror.when.tree.depth"),
        ("{tree.depth: 4}", "tree.depth never is 4"),
        ("{train.lr: 3}", "train.lr never is 3"),
        ("{tree.depth: x}", "factors.tree.depth is 'x'"),
    ],
)
def test_a_condition_names_a_level_that_exists(when: str, told: str, tmp_path: Path) -> None:
    factors = f"tree.depth: [2, 3], train.lr: {{range: {{low: 0.1, high: 0.2}}}}, tree.mirror: {{levels: [0, 1], when: {when}}}"
    text = f"{BASE}design: search\nbudget: {{trials: 9}}\nfinalists: {{count: 0}}\nfactors: {{{factors}}}\n"
    assert told in refused(tmp_path, text)


def test_a_condition_and_an_arm_count_in_any_spelling(tmp_path: Path) -> None:
    grid = expand(
        load(tmp_path, BASE + "factors: {tree.depth: ['2', 3], tree.mirror: {levels: [0, 1], when: {tree.depth: 2}}}\n")
    )
    assert len(grid.arms) == 3
    each = expand(load(tmp_path, BASE + "design: one_at_a_time\nfactors: {train.lr: [3e-3, 1e-3]}\n"))
    assert [arm.label for arm in each.arms] == ["reference", "lr=1e-3"], "3e-3 is the base's"


def test_a_search_knows_a_candidate_in_any_spelling(tmp_path: Path) -> None:
    study = load(
        tmp_path,
        f"{BASE}design: search\nbudget: {{trials: 9}}\nfinalists: {{count: 0}}\n"
        "factors: {train.lr: [1e-3, 3e-3], tree.mirror: [0, 1], tree.depth: {range: {low: 2, high: 4}}}\n",
    )
    space = Space(study)
    spellings: list[dict[str, Any]] = [
        {"train.lr": 0.001, "tree.mirror": 0, "tree.depth": 3},
        {"train.lr": "1e-3", "tree.mirror": 0.0, "tree.depth": 3.0},
    ]
    known = [space.read(chosen, "enqueue.0") for chosen in spellings]
    assert key_of(known[0]) == key_of(known[1])
    assert key_of(spellings[0]) == key_of({**spellings[0], "tree.depth": 3.0})
    assert space.candidate(known[0]).changes == space.candidate(known[1]).changes
    for wrong in ({"tree.depth": 3.5}, {"tree.depth": float("inf")}, {"tree.mirror": True}, {"train.lr": 0.002}):
        with pytest.raises(ConfigError, match=r"^enqueue\.0: "):
            space.read({**spellings[0], **wrong}, "enqueue.0")


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        ("{low: 0.5, high: 2.5}", "factors.tree.depth.range.low is 0.5: a whole number is expected"),
        ("{low: 0, high: 1.0e+300, integer: true}", "factors.tree.depth is 1"),
        ("{low: 0, high: .inf}", "factors.tree.depth.range.high is inf"),
        ("{low: true, high: 3}", "factors.tree.depth.range.low is True"),
    ],
)
def test_ranges_that_cannot_be_searched(bounds: str, told: str, tmp_path: Path) -> None:
    text = f"{BASE}design: search\nbudget: {{trials: 2}}\nfinalists: {{count: 0}}\nfactors: {{tree.depth: {{range: {bounds}}}}}\n"
    assert told in refused(tmp_path, text)


# --- keys that are lost, and other exceptions of a parser


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("title: a\ntitle: b\n", "sets 'title' twice, at lines 1 and 2"),
        ("base: {tree: {depth: 1}}\nseeds: [1]\nbase: {}\n", "sets 'base' twice, at lines 1 and 3"),
        ("base:\n  tree: {depth: 3}\n  tree: {trees: 2}\n", "sets 'tree' twice, at lines 2 and 3"),
        ("factors: {tree.mirror: [0, 1], tree.mirror: [0, 0.5]}\n", "sets 'tree.mirror' twice, at lines 1 and 1"),
        ("title: a\n'title': b\n", "sets 'title' twice"),
        ("[a]: 1\n", "a key at line 1 is a list or a mapping"),
        ('title: "\\ud83d"\n', "is not text at line 1: half a character, U+D83D"),
        ('arms: {"\\udc00x": {}}\n', "half a character, U+DC00"),
        ('title: "\\0"\n', "a control character, U+0000"),
        ('notes: |\n  a\narms: {"a\\e[31m": {tree.depth: 1}}\n', "at line 3: a control character, U+001B"),
        ("x\x07y: 1\n", "at line 1: a control character, U+0007"),
        ("a: 1\nb: 2024-99-99\n", "is not YAML: month must be in 1..12"),
        ("a: !!int x\n", "is not YAML"),
        ("a: !!float ''\n", "is not YAML"),
        ("a: !!bool maybe\n", "is not YAML"),
        ("a: !!timestamp x\n", "is not YAML"),
        ("a: !!python/name:os.system\n", "is not YAML at line 1"),
        ("a: &a {b: *a}\n", "a value holds itself at line 1"),
        ("a: " + "[" * 100 + "]" * 100, f"nested too deep at line 1: {DEEPEST} levels are allowed"),
        ("a: " + "[" * 1500, "nested too deep"),
        ("- " * 1500, "nested too deep"),
        ("a: " + "9" * 5000, "has a number of 5,000 characters at line 1"),
        ("a: " + "9" * 900 + "\n", "a: unknown setting"),
        ("title: " + "x" * 2**20, "is larger than 1,048,576 bytes"),
        ("name: compare\n" + BASE + GRID, "name is 'compare': "),
    ],
    ids=lambda t: ascii(t[:20]),
)
def test_what_a_yaml_parser_would_lose_or_fall_over(text: str, told: str, tmp_path: Path) -> None:
    assert told in refused(tmp_path, text)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"title: a\nnotes: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"not text in UTF-8: byte 0xe9 at line 2$"):
        load_study(tmp_path / "s.yaml")
    with pytest.raises(ConfigError, match=r"is larger than"):
        load_study(Path("/dev/zero"))
    with pytest.raises(ConfigError, match=r"cannot be read: embedded null byte"):
        load_study(Path("a\0b"))


def test_an_emoji_as_json_spells_it_and_a_merge_key_are_text_and_settings(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + GRID + 'title: "\\ud83d\\ude00"\n').title == "\U0001f600"
    merged = BASE + "arms:\n  a: &a {tree.depth: 4}\n  b: {<<: *a, tree.depth: 5}\n" + GRID
    assert load(tmp_path, merged).arms["b"] == {"tree.depth": 5}
    assert load(tmp_path, "\ufeff" + BASE + GRID).seeds == [0, 1, 2]


def test_json_of_a_user_ends_in_one_line() -> None:
    for text in ("[" * 100_000, "9" * 5000, '{"a": }', "", "{'a': 1}", '"\x01"'):
        with pytest.raises(ConfigError, match=r"^x is not JSON: "):
            load_json(text, "x")


KEYS = st.sampled_from(["title", "seeds", "name", "a b", "1", "~", "tree.mirror"]) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_what_yaml_can_hold_comes_back_or_is_refused_for_its_characters(value: Any) -> None:
    text = yaml.safe_dump({"v": value}, allow_unicode=True)
    expected = yaml.safe_load(text)
    try:
        found = load_yaml(text, "x")
    except ConfigError as error:
        assert "control character" in str(error)  # noqa: PT017
        return
    assert repr(found) == repr(expected)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_yaml_or_one_line(text: str) -> None:
    try:
        load_yaml(text, "x")
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017


# --- bounded work


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [0,0,0,0,0,0,0,0,0]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    for text in ("\n".join(lines), "base:\n  questions:\n" + "\n".join(f"    {line}" for line in lines)):
        assert "over 200,000 values" in refused(tmp_path, text)
    small = "base:\n  questions:\n    tasks:\n    - &a [0,0,0,0,0,0,0,0,0]\n    - [*a,*a,*a,*a,*a]\n" + GRID
    assert "base.questions.tasks.0 is [0, 0, 0" in refused(tmp_path, small)


@pytest.mark.parametrize("budget", ["", "budget: {trials: 10}\n"])
def test_a_grid_of_a_billion_arms_is_refused_before_one_is_built(budget: str, tmp_path: Path) -> None:
    levels = str([round(0.1 + 0.01 * i, 2) for i in range(10)])
    keys = ["tree.mirror", "tree.node_mirror", "train.lr", "train.warmup", "train.final_lr", "train.weight_decay"]
    keys += ["train.grad_clip", "train.node_lr_scale", "train.tree_decay"]
    text = BASE + budget + "factors: {" + ", ".join(f"{key}: {levels}" for key in keys) + "}\n"
    told = refused(tmp_path, text)
    assert told.startswith("budget.trials is 10: the design has " if budget else "factors: the design has ")


def test_a_budget_that_is_passed_by_little_still_names_the_exact_number(tmp_path: Path) -> None:
    text = BASE + "budget: {trials: 11}\nfactors: {tree.mirror: [0, 1], tree.depth: [2, 3]}\n"
    assert "budget.trials is 11: the design has 12 trials" in refused(tmp_path, text)


@pytest.mark.parametrize("field", ["vocab_size: 2000000000", "vocab_size: 16777217"])
def test_a_vocabulary_that_would_end_the_process_is_refused(field: str, tmp_path: Path) -> None:
    told = refused(tmp_path, f"base: {{corpus: {{{field}}}}}\n{GRID}")
    assert "input should be less than or equal to 16777216" in told


def test_what_is_accepted_can_be_written_down(tmp_path: Path) -> None:
    plan = expand(load(tmp_path, BASE + GRID + 'title: "naïve ∑ 🌳"\nnotes: |\n  two\n  lines\n'))
    assert plan_document(plan)["title"] == "naïve ∑ 🌳"


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ("model: {d_model: 1048576, heads: 1}", "for parameters"),
        ("model: {blocks: 1000000}", "for parameters"),
        ("tree: {trees: 1048576}", "for parameters"),
        ("tree: {leaf_width: 1048576}", "for parameters"),
        ("train: {batch_size: 1000000000}", "for a micro-batch"),
        ("train: {batch_size: 1000000, accumulate: 2}, model: {context: 1048576}", "for a micro-batch"),
    ],
)
@pytest.mark.parametrize("verb", [forecast, run_study])
def test_a_trial_that_fits_no_machine_is_refused_before_any_work(
    verb: Callable[[Study, Path], object], settings: str, part: str, tmp_path: Path
) -> None:
    study = load(tmp_path, f"base: {{{settings}}}\n{GRID}")
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"mirror=\d needs at least [\d,.]+ GiB of memory") as error:
        verb(study, tmp_path / "project")
    assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "project").exists()
    assert time.process_time() - began < 2


def test_the_least_memory_is_less_than_what_a_step_is_measured_to_take() -> None:
    for changes in (
        {},
        {"model.d_model": 256},
        {"model.feedforward": "dense"},
        {"train.activation_checkpointing": True},
    ):
        trial = parse(Study, {"name": "s", "factors": {"tree.mirror": [0]}}).trial(changes)
        again, count = trial.train.activation_checkpointing, trial.train.batch_size
        needs = step_memory(trial, trial.corpus.vocab_size, sequences=count, checkpointing=again, precision="bf16")
        assert 0.2 * needs.peak < sum(least_bytes(trial)) <= needs.peak, changes


def test_as_many_workers_as_fit(tmp_path: Path) -> None:
    trial = parse(Study, {"name": "s", "factors": {"tree.mirror": [0]}}).trial({})
    workers = machine_bytes()[0] // sum(least_bytes(trial))
    check_memory([("one", trial)], workers)
    with pytest.raises(ConfigError, match=f"workers is {2 * workers}: one needs at least"):
        check_memory([("one", trial)], 2 * workers)
