"""The GPU kernels without a GPU: in Triton's interpreter, and compiled for three targets. Each in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ablate.kernels.triton.aot import SHARED_LIMIT, TARGETS, Result, cases, compile_all
from ablate.kernels.triton.tiling import KERNELS, Config

ROOT = Path(__file__).parents[2]


def interpreter_lane(*options: str, seconds: int) -> None:
    """Run tests/triton_interpreter where triton is imported as its interpreter; fail with what it printed.

    In one process: the tests beside it use the other cores, and each further process collects and imports all again.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/triton_interpreter",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    settings = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    settings = {name: value for name, value in settings.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-20000:]}\n{done.stderr[-5000:]}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.timeout(900)
def test_the_interpreter_agrees_with_the_reference() -> None:
    interpreter_lane("-m", "not soak", seconds=880)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_interpreter_agrees_with_the_reference_at_large_depths() -> None:
    interpreter_lane("-m", "soak", seconds=3500)


QUICK = ("sm_90", "gfx942")
"""One target of each maker; the short proofs compile for all."""


@pytest.fixture(scope="module")
def command() -> subprocess.CompletedProcess[str]:
    """The module's command line, with the interpreter asked for: compilation must not care."""
    line = [sys.executable, "-m", "ablate.kernels.triton.aot", "--json", *(f"--target={t}" for t in QUICK)]
    settings = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(line, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def printed(command: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Its lines."""
    return [json.loads(line) for line in command.stdout.splitlines()]


def test_every_configuration_compiles_without_spills_and_uses_matrix_units(printed: list[dict[str, Any]]) -> None:
    fit([Result(**line | {"config": Config(**line["config"])}) for line in printed], QUICK)


@pytest.mark.soak_short
@pytest.mark.timeout(900)
def test_every_configuration_compiles_for_every_target() -> None:
    fit(list(compile_all(tuple(TARGETS))), tuple(TARGETS))


def fit(results: list[Result], targets: tuple[str, ...]) -> None:
    assert {r.kernel for r in results} == set(KERNELS)
    assert {r.target for r in results} == set(targets)
    for r in results:
        assert r.spills == 0, r
        assert r.shared_bytes <= SHARED_LIMIT[r.target], r
        assert r.tf32_instructions == 0, r
        products = r.kernel in {"tile_dots", "leaf_dots", "tile_wgrad", "spread"}
        if r.dtype == "bf16":
            assert (r.matrix_instructions > 0) == products, r


@pytest.mark.soak
def test_every_variant_compiles_without_spills() -> None:
    assert not [r for r in compile_all(tuple(TARGETS), wide=True) if not r.fits or r.tf32_instructions]


def test_the_command_prints_one_object_a_line(
    command: subprocess.CompletedProcess[str], printed: list[dict[str, Any]]
) -> None:
    assert (command.returncode, command.stderr) == (0, "")
    wanted = {"kernel", "config", "dtype", "target", "registers", "spills", "shared_bytes", "matrix_instructions"}
    assert all(wanted <= set(line) for line in printed)


def test_one_target_has_every_kernel_and_no_other_target() -> None:
    chosen = list(cases(["sm_90"], wide=False))
    assert {c.target for c in chosen} == {"sm_90"}
    assert {c.kernel for c in chosen} == set(KERNELS)


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="sm_42"):
        next(compile_all(["sm_42"]))


def test_without_the_interpreter_cpu_tensors_are_refused() -> None:
    program = (
        "import torch; from ablate.kernels.op import route; from ablate.kernels.spec import TreeSpec; "
        "route(torch.zeros(1, 4), torch.zeros(1, 2, 4), None, TreeSpec(trees=1, depth=0, leaf_width=2), backend='triton')"
    )
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert "RuntimeError: the triton backend needs a GPU" in done.stderr
