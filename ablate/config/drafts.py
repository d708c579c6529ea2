"""New study files: a commented one to start from, and a copy of one with other settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml

from ablate.config import schema
from ablate.config.errors import ConfigError, echo
from ablate.config.reading import load_study
from ablate.config.section import parse
from ablate.config.settings import Trial
from ablate.config.study import Study
from ablate.config.text import load_yaml, read_text
from ablate.files import write_text

Design = Literal["factorial", "one_at_a_time", "search", "confirm"]

_HEAD = """\
{header}
# docs/studies.md lists every setting. `ablate study plan studies/{name}.yaml` checks this file and says what it costs.
title: {title}
design: {design}
base:                                  # what all trials share; what is not set here has its default
  corpus: {{source: stdlib}}             # text: the standard library of this Python; or {{source: files, path: texts/*.txt}}
  # embedding_norm: without it runs at this size are worse by an eighth of a bit, and seeds differ three times as much
  model: {{d_model: 128, blocks: 2, heads: 4, context: 128, embedding_norm: true}}
  tree: {{trees: 4, depth: 6, leaf_width: 4}}
  train: {{steps: 300, batch_size: 4, lr: 0.004, eval_every: 100, keep_checkpoint: true}}
"""
_BODY: dict[Design, str] = {
    "factorial": """\
factors:                               # every combination of these levels is an arm
  tree.routing: [sign, centred]        # thresholds stay at 0, or follow each node's balance
  tree.mirror: [0, 1]                  # the nonlinearity: GELU, or the even GELU(z) + GELU(-z)
seeds: [0, 1, 2, 3, 4]                 # each arm runs once on each
margin: 0.02                           # bits per byte within which two arms count as equal
# controls: [active, total]            # dense layers of as many active, and as many total units
# match: total_units                   # where a factor changes the trees' shape: keep the number of units
""",
    "one_at_a_time": """\
factors:                               # each arm changes one of these to one other level; the base is the reference
  tree.routing: [sign, centred]        # thresholds stay at 0, or follow each node's balance
  tree.router: [tied, frozen]          # nodes decide by learnt weights, or by a copy of their initial ones
  tree.init: [uniform, orthogonal]
seeds: [0, 1, 2, 3, 4]                 # each arm runs once on each
margin: 0.02                           # bits per byte within which two arms count as equal
# controls: [active, total]            # dense layers of as many active, and as many total units
""",
    "search": """\
objectives: [bpb, bits_lost]           # what candidates should be good at; one or more
budget: {trials: 24}                   # training runs, finalists included
factors:
  tree.routing: [sign, centred]
  tree.depth: {range: {low: 3, high: 6}}
  tree.leaf_width: [1, 2, 4]
  train.lr: {range: {low: 0.001, high: 0.01, log: true}}
match: total_units                     # the number of trees follows, so that all candidates have as many units
seeds: [0, 1]                          # a candidate gets the next seed only while it may still be among the best
finalists: {count: 2, seeds: [100, 101, 102]}   # the best run again on fresh seeds
""",
    "confirm": """\
arms:                                  # changes of the base; the base itself is the arm `reference`
  centred routing: {tree.routing: centred}
  frozen router: {tree.router: frozen}
contrasts:                             # what is claimed, before a trial runs; the plan is fixed from then on
  - {arm: centred routing, endpoint: n_eff_frac, claim: higher, margin: 0.05}
  - {arm: frozen router, endpoint: n_eff_frac, claim: higher, margin: 0.05}
  - {arm: centred routing, endpoint: bpb, claim: matches, margin: 0.05}
seeds: [100, 101, 102, 103, 104, 105, 106, 107]   # fresh ones; eight pairs are the least for an exact test
""",
}
DESIGNS: tuple[Design, ...] = tuple(_BODY)


def new_study(name: str, design: Design, root: Path) -> Path:
    """Write a commented study file root/studies/<name>.yaml and the schema beside it; return its path.

    Raises:
        ConfigError: the name is not allowed, or there is such a file.
    """
    path = root / "studies" / f"{name}.yaml"
    title = f"My {design.replace('_', ' ')} study"
    text = _HEAD.format(header=schema.HEADER, name=name, title=title, design=design) + _BODY[design]
    parse(Study, {"name": name, **load_yaml(text, name)})
    _write(path, text)
    return path


def changed_study(file: Path, settings: list[str], name: str | None = None) -> Path:
    """Write a study file with other settings beside it and return its path; the same settings give the same file.

    Args:
        file: the study file.
        settings: `key=value`; the key is a field (train.steps) or section (train) of a trial, or a field of the study
            (seeds), the value YAML.
        name: of the new study; made of the old one's and the settings where not given.

    Raises:
        ConfigError: a setting is none or not allowed, or a file of that name has another content.
    """
    data = changed(file, settings, name)
    path = file.with_name(f"{data['name']}.yaml")
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    text = f"{schema.HEADER}\n# {file.name} with {', '.join(settings)}; a copy that --set made.\n{body}"
    if not (path.exists() and read_text(path, str(path)) == text):
        _write(path, text)
    return path


def placed_study(file: Path, root: Path) -> Study:
    """Read a study file; one from elsewhere is copied to root/studies, where findings and reports look for it.

    Raises:
        ConfigError: the file is not valid, or another study there has its name.
    """
    study = load_study(file)
    path = root / "studies" / f"{study.name}.yaml"
    if not path.exists():
        write_text(path, read_text(file, str(file)))
    elif load_study(path) != study:
        raise ConfigError(
            f"study file {str(file)!r} is not {str(path)!r}, which has its name: change that one, or rename this"
        )
    return study


def changed(file: Path, settings: list[str], name: str | None = None) -> dict[str, Any]:
    """Return what a study file with other settings says, checked; raises ConfigError like `changed_study`."""
    study = load_study(file)
    data = {"name": study.name, **load_yaml(read_text(file, str(file)), str(file))}
    for setting in settings:
        _set(data, setting)
    data["name"] = name or _name(study.name, settings)
    parse(Study, data)
    return data


def _set(data: dict[str, Any], setting: str) -> None:
    key, found, value = setting.partition("=")
    if not (found and key):
        raise ConfigError(f"set is {echo(setting)}: key=value is expected, such as train.steps=50")
    section, dot, field = key.partition(".")
    place = data.setdefault("base", {}) if section in Trial.model_fields else data
    place = place.setdefault(section, {}) if dot else place
    place[field if dot else section] = load_yaml(value, f"set {echo(setting)}")


def _name(study: str, settings: list[str]) -> str:
    """Return a study's name that says which settings differ, as far as 64 characters do."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{study}-{'-'.join(settings)}").strip("-")[:64]


def _write(path: Path, text: str) -> None:
    if path.exists():
        raise ConfigError(f"study file {str(path)!r} exists: give another name")
    write_text(path, text)
    beside = path.with_name(schema.FILE)
    if not beside.exists() or beside.read_text(encoding="utf-8") != schema.text():
        write_text(beside, schema.text())
