"""What `ablate reproduce` says of a trial that was run again."""

from __future__ import annotations

import pytest

from ablate.tracking import tags
from ablate.tracking.reproduce import Reproduction

CODE = {tags.GIT_COMMIT: ("abc", "def")}


@pytest.mark.parametrize(
    ("after", "changed", "verdict"),
    [
        ({0: 2.0, 5: 1.5}, CODE, "Equal bit for bit."),
        ({0: 2.0, 5: 1.75}, {}, "Not equal: bpb differs by up to 0.25."),
        ({0: 2.0, 5: 1.75}, {tags.GIT_COMMIT: ("", "def")}, "Not equal: bpb differs by up to 0.25."),
        (
            {0: 2.0, 5: 1.75},
            CODE,
            "Not equal: bpb differs by up to 0.25. Commit abc made it: check that out to repeat it exactly.",
        ),
    ],
)
def test_a_difference_names_the_code_that_it_needs(
    after: dict[int, float], changed: dict[str, tuple[str, str]], verdict: str
) -> None:
    assert Reproduction("t", "bpb", {0: 2.0, 5: 1.5}, after, changed).verdict == verdict
