"""Finding a run's weights: every name people have for it, and what is said where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ablate.config import ConfigError
from ablate.training.runs import find_checkpoint

TRIAL, RUN = "0123456789ab", "f" * 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    results = tmp_path / "results" / "laptop"
    results.mkdir(parents=True)
    (results / "plan.json").write_text("[]")
    (results / f"{TRIAL}.json").write_text(json.dumps({"run_id": RUN, "status": "finished"}))
    (results / "aaaaaaaaaaaa.json").write_text(json.dumps({"run_id": None, "status": "diverged"}))
    return tmp_path


def keep(root: Path) -> Path:
    weights = root / "state" / "trials" / TRIAL / "model.pt"
    weights.parent.mkdir(parents=True)
    weights.touch()
    return weights


@pytest.mark.parametrize("name", [TRIAL, RUN, TRIAL[:8], RUN[:8]])
def test_a_trial_and_a_run_lead_to_the_weights(root: Path, name: str) -> None:
    weights = keep(root)
    assert find_checkpoint(name, root) == weights
    assert find_checkpoint(str(weights), root) == find_checkpoint(str(weights.parent), root) == weights


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (TRIAL, "run '0123456789ab' of study 'laptop' kept no weights: `ablate reproduce 0123456789ab --keep`"),
        (RUN, "of study 'laptop' kept no weights: .* \\(train.keep_checkpoint: true under base"),
        ("aaaaaaaaaaaa", "ended diverged: only finished ones keep weights"),
        ("bbbbbbbbbbbb", "run 'bbbbbbbbbbbb' is not known: no result in"),
        ("e" * 32, "is not known: no result in"),
        ("somewhere/model.pt", "a file that exists, a trial's hash"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(root: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        find_checkpoint(name, root)
    assert "\n" not in str(caught.value)


def test_a_name_of_several_trials_is_refused(root: Path) -> None:
    (root / "results/laptop" / f"{TRIAL[:8]}ffff.json").write_text("{}")
    with pytest.raises(ConfigError, match="could be any of 0123456789ab, 01234567ffff: give more of its name"):
        find_checkpoint(TRIAL[:8], root)


def test_a_folder_without_weights_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder without a model\.pt"):
        find_checkpoint(str(root), root)
