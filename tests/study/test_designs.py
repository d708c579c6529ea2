"""Plans are pure functions of the study file: every arm, seed and derived size, before anything runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ablate.config import ConfigError, Study, Tree, parse
from ablate.config.tune import Trace
from ablate.study.designs import expand
from ablate.study.fractions import fraction_of
from ablate.study.matching import allowed, derive


def study(**settings: Any) -> Study:
    return parse(Study, {"name": "s", **settings})


GRID = {"tree.mirror": [0, 1], "tree.placement": ["unit", "tree"], "tree.bias": [True, False]}


def test_factorial_is_the_whole_grid_with_readable_labels() -> None:
    plan = expand(study(factors=GRID, seeds=[3, 4]))
    assert [a.label for a in plan.arms][:2] == ["mirror=0 placement=unit bias=on", "mirror=0 placement=unit bias=off"]
    assert len(plan.arms) == 8
    assert len(plan.trials) == plan.total == 16
    assert len({t.hash for t in plan.trials}) == 16
    assert {t.factors["tree.bias"] for t in plan.trials} == {True, False}


def test_trials_of_one_seed_come_together_and_share_both_seeds() -> None:
    plan = expand(study(factors=GRID, seeds=[7, 2]))
    assert [t.seed for t in plan.trials] == [7] * 8 + [2] * 8
    assert all(t.trial.init_seed == t.trial.data_seed == t.seed for t in plan.trials)


def test_a_label_shows_the_section_where_two_fields_share_a_name() -> None:
    plan = expand(study(factors={"tree.mirror": [0, 1], "dense.mirror": [0, 1]}))
    assert plan.arms[0].label == "tree.mirror=0 dense.mirror=0"


def test_a_conditional_factor_exists_only_where_its_condition_holds() -> None:
    factors = {
        "tree.mirror": {"levels": [0, 1], "when": {"tree.activation": "relu"}},
        "tree.activation": ["gelu", "relu"],
    }
    labels = [a.label for a in expand(study(factors=factors)).arms]
    assert labels == ["activation=gelu", "mirror=0 activation=relu", "mirror=1 activation=relu"]


def test_one_at_a_time_changes_one_field_of_the_reference() -> None:
    plan = expand(study(design="one_at_a_time", factors={"tree.mirror": [0, 1], "tree.depth": [4, 6]}))
    assert [(a.label, dict(a.changes)) for a in plan.arms] == [
        ("reference", {}),
        ("mirror=1", {"tree.mirror": 1}),
        ("depth=4", {"tree.depth": 4}),
    ]


def test_controls_have_the_units_of_the_tree_and_no_tree_factors() -> None:
    plan = expand(study(factors={"tree.depth": [5, 6]}, controls=["total", "active", "none", "moe"]))
    controls = {t.arm: t for t in plan.trials if t.kind == "control"}
    base = plan.study.trial({}).tree
    assert list(controls) == ["dense_total", "dense_active", "dense_none", "moe"]
    assert controls["dense_total"].trial.dense.width == base.total_units == 1276
    assert controls["dense_active"].trial.dense.width == base.active_units == 40
    assert controls["dense_none"].trial.model.feedforward == "none"
    assert all(c.factors == {"tree.depth": None} for c in controls.values())
    mixture = controls["moe"].trial
    assert mixture.moe.width is not None
    assert (mixture.model.feedforward, mixture.moe.width) == ("moe", 40)
    assert 1276 - 40 < mixture.moe.experts * mixture.moe.width <= 1276
    assert mixture.train.load_loss == 0.01
    assert any("auxiliary loss" in note for note in plan.notes)


def test_dense_controls_come_in_the_dense_activation_and_in_each_that_arms_have() -> None:
    base = {"dense": {"activation": "silu"}}
    arms = {"even": {"tree.mirror": 1}, "deep": {"tree.depth": 7}, "plain": {"tree.activation": "silu"}}
    contrast = {"arm": "even", "reference": "dense_total activation=gelu mirror=1", "claim": "lower", "margin": 0.01}
    plan = expand(study(design="confirm", base=base, arms=arms, contrasts=[contrast], controls=["total", "none"]))
    controls = {t.arm: t.trial for t in plan.trials if t.kind == "control"}
    assert list(controls) == [
        "dense_total", "dense_total activation=gelu", "dense_total activation=gelu mirror=1", "dense_none",
    ]  # fmt: skip
    layers = [controls[name].dense for name in list(controls)[:3]]
    assert [(d.activation, d.mirror) for d in layers] == [("silu", 0), ("gelu", 0), ("gelu", 1)]
    assert len({d.width for d in layers}) == 1


def test_only_evaluation_trials_are_asked_questions() -> None:
    base = {"questions": {"tasks": ["heldout_cloze"]}}
    plan = expand(
        study(factors={"tree.mirror": [0, 1]}, base=base, tune={"lr": [0.1, 0.2], "seeds": [9]}),
        {"mirror=0": Trace({0.1: 0, 0.2: 0}, 0.1, bound=True, least=2)},
    )
    assert {(t.kind, t.trial.questions.tasks) for t in plan.trials} == {("tune", ()), ("arm", ("heldout_cloze",))}


@pytest.mark.parametrize("match", ["total_units", "active_units"])
@pytest.mark.parametrize(
    "factors", [{"tree.depth": [3, 4, 5]}, {"tree.depth": [3, 5], "tree.leaf_width": [2, 4]}], ids=str
)
def test_matched_sizes_are_within_a_tenth_and_said(match: str, factors: dict[str, Any]) -> None:
    base = {"tree": {"trees": 16, "depth": 4, "leaf_width": 10}, "train": {"eval_tokens": 65536}}
    plan = expand(study(factors=factors, match=match, base=base))
    target = getattr(plan.study.trial({}).tree, match)
    for trial in plan.trials:
        assert 10 * abs(getattr(trial.trial.tree, match) - target) <= target
    derived = "leaf_width" if len(factors) == 1 else "trees"
    assert all(f"tree.{derived} = " in arm.derived for arm in plan.arms)
    assert len(plan.notes) == len(plan.arms)


def test_a_fraction_prints_its_aliases() -> None:
    factors = {
        "tree.mirror": [0, 1],
        "tree.placement": ["unit", "tree"],
        "tree.bias": [True, False],
        "tree.gain": ["raw", "unit"],
    }
    plan = expand(study(factors=factors, fraction=["tree.gain = tree.mirror * tree.placement * tree.bias"]))
    assert len(plan.arms) == 8
    assert plan.notes[0] == "fraction: 8 of 16 runs, resolution 4"
    assert "aliased, cannot be separated: tree.mirror·tree.placement = tree.bias·tree.gain" in plan.notes


@pytest.mark.parametrize("sign", ["", "-"])
def test_aliased_effects_have_equal_columns_and_others_orthogonal_ones(sign: str) -> None:
    names = ["tree.mirror", "tree.placement", "tree.bias", "tree.gain", "tree.router"]
    levels: list[list[Any]] = [[0, 1], ["unit", "tree"], [True, False], ["raw", "unit"], ["tied", "frozen"]]
    generators = [f"tree.gain = {sign}tree.mirror * tree.placement", "tree.router = tree.mirror * tree.bias"]
    fraction = fraction_of(study(factors=dict(zip(names, levels, strict=True)), fraction=generators))
    runs = fraction.runs()
    codes = {n: [1 if run[n] == level[1] else -1 for run in runs] for n, level in zip(names, levels, strict=True)}

    def column(effect: str) -> tuple[int, ...]:
        signed = -1 if effect.startswith("-") else 1
        columns = [codes[name] for name in effect.lstrip("-").split("·")]
        return tuple(signed * (a if len(columns) == 1 else a * columns[1][i]) for i, a in enumerate(columns[0]))

    groups = fraction.aliases()
    for group in groups:
        assert len({column(effect) for effect in group}) == 1
    alias_of = {effect.lstrip("-"): i for i, group in enumerate(groups) for effect in group}
    effects = [*names, *("·".join(pair) for pair in itertools.combinations(names, 2))]
    for a, b in itertools.combinations(effects, 2):
        if alias_of.get(a, a) != alias_of.get(b, b):
            assert sum(x * y for x, y in zip(column(a), column(b), strict=True)) == 0


def test_the_hash_depends_on_what_decides_and_on_nothing_else() -> None:
    first = expand(study(factors=GRID))
    assert expand(study(factors=GRID, title="t", notes="n")).hash == first.hash
    assert expand(study(factors=GRID, seeds=[0, 1, 2, 3])).hash != first.hash
    assert expand(study(factors=GRID, margin=0.02)).hash != first.hash


def test_seeds_and_levels_extend_a_space_and_a_new_base_starts_another() -> None:
    first = expand(study(factors=GRID)).space
    assert expand(study(factors={**GRID, "tree.mirror": [0, 1, -1]}, seeds=[5])).space == first
    assert expand(study(factors=GRID, base={"train": {"lr": 0.01}})).space != first
    assert expand(study(factors={"tree.mirror": [0, 1]})).space != first


def test_tuning_trials_come_first_and_evaluation_waits_for_the_rate() -> None:
    tuned = study(factors={"tree.mirror": [0, 1]}, seeds=[0, 1], tune={"lr": [0.003, 0.001], "seeds": [8, 9]})
    plan = expand(tuned)
    assert [t.kind for t in plan.trials] == ["tune"] * 8
    assert (plan.waiting_for_tune, plan.total) == (4, 12)
    later = expand(tuned, {"mirror=0": Trace({0.001: 0, 0.003: 0}, 0.001, bound=True, least=2)})
    assert [(t.arm, t.trial.train.lr) for t in later.trials if t.kind == "arm"] == [("mirror=0", 0.001)] * 2
    assert (later.hash, later.total) == (plan.hash, plan.total)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"factors": {"tree.mirror": [0, 3]}}, ["mirror", "3"]),
        ({"factors": {"model.heads": [4, 5]}}, ["arm 'heads=5'", "d_model"]),
        (
            {"factors": {"tree.mirror": [0, 1]}, "arms": {"x": {"tree.mirror": 1}}},
            ["'x'", "same configuration", "mirror=1"],
        ),
        ({"factors": {"tree.mirror": [0, 1]}, "budget": {"trials": 5}}, ["budget.trials", "5", "6"]),
        ({"factors": {"tree.depth": [2, 9]}, "match": "total_units"}, ["match"]),
        (
            {
                "factors": {"tree.depth": [5, 6], "tree.leaf_width": [2, 4], "tree.trees": [2, 4]},
                "match": "active_units",
            },
            ["match", "leaf_width", "trees"],
        ),
        ({"factors": {"train.lr": [0.1, 0.2]}, "tune": {"lr": [0.1, 0.2], "seeds": [9]}}, ["tune", "train.lr"]),
        ({"factors": {"tree.mirror": {"levels": [0, 1], "when": {"tree.depth": 3}}}}, ["when", "tree.depth"]),
        (
            {"factors": GRID, "fraction": ["tree.bias = tree.mirror + tree.placement"]},
            ["fraction", "tree.bias = tree.mirror +"],
        ),
        (
            {"factors": {**GRID, "tree.mirror": [0, 1, -1]}, "fraction": ["tree.bias = tree.mirror * tree.placement"]},
            ["two levels"],
        ),
        ({"design": "search", "factors": GRID, "budget": {"trials": 3}, "controls": ["total"]}, ["controls", "search"]),
        (
            {
                "design": "confirm",
                "factors": GRID,
                "arms": {"x": {"tree.mirror": 1}},
                "contrasts": [{"arm": "x", "claim": "lower", "margin": 0.1}],
            },
            ["factors", "confirm"],
        ),
        *(
            (
                {
                    "design": "confirm",
                    "arms": {"x": {"tree.mirror": 1}},
                    "controls": ["total"],
                    "base": {"questions": {"tasks": ["heldout_cloze"]}},
                    "contrasts": [{"arm": "x", "claim": "lower", "margin": 0.1, **changed}],
                },
                words,
            )
            for changed, words in (
                ({"reference": "dense_active"}, ["'dense_active'", "reference, x, dense_total, dense_total mirror=1"]),
                ({"endpoint": "qa/heldout_cloze/5shot/acc"}, ["'qa/heldout_cloze/5shot/acc'", "0shot"]),
                ({"endpoint": "bbp"}, ["'bbp'", "bpb, n_eff_frac"]),
            )
        ),
    ],
    ids=lambda v: "" if isinstance(v, list) else None,
)
def test_impossible_designs_are_one_line_naming_key_and_value(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        expand(study(**settings))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("match", ["total_units", "active_units"])
def test_a_size_is_refused_exactly_where_it_lies_outside_the_bounds_that_the_message_names(match: str) -> None:
    """44 units are 10% more than 40; in floating point they are a little further."""
    for target in range(1, 400):
        least, most = allowed(target)
        for width in range(1, 9):
            found = derive(match, target, Tree(trees=4, depth=2, leaf_width=width), "trees")
            assert found.close == (least <= found.units <= most) == (10 * abs(found.units - target) <= target)
    assert derive("active_units", 40, Tree(trees=4, depth=3, leaf_width=8), "trees").units == 44
    assert derive("active_units", 40, Tree(trees=4, depth=3, leaf_width=8), "trees").close
