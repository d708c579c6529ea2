"""The first compilation of the CPU kernels is said, and is done once."""

from __future__ import annotations

from pathlib import Path

from ablate.config import Trial, parse
from ablate.study.kernels import compile_kernels


def test_kernels_are_compiled_once_and_only_for_trials_that_call_them(tmp_path: Path) -> None:
    said: list[str] = []
    dense, plain = parse(Trial, {"model": {"feedforward": "dense"}}), parse(Trial, {"train": {"backend": "reference"}})
    compile_kernels([dense, plain], tmp_path, said.append)
    assert said == []
    compile_kernels([dense, Trial()], tmp_path, said.append)
    first = len(said)
    compile_kernels([Trial()], tmp_path, said.append)
    assert first == len(said), "the second time nothing is done"
    assert said[:1] in ([], ["looking at the CPU kernels"])
