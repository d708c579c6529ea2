"""Tests of the Triton kernels in Triton's interpreter, on CPU tensors.

The interpreter must be chosen before triton is first imported, by anyone, so these run in processes of their own, which
tests/kernels/test_triton.py starts with TRITON_INTERPRET=1. Without it they are not collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl  # type: ignore[import-untyped]
import triton.runtime.interpreter as interpreter  # type: ignore[import-untyped]

from tests.kernels.conftest import pytest_generate_tests

__all__ = ["pytest_generate_tests"]

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """Every allocation of torch.empty is NaN (the largest integer for integers), so an unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    # The flag is a property of the module, which its type does not show; it is on unless somebody turned it off.
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_measurements(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No table of this machine's measurements may choose what is tested."""
    monkeypatch.setenv("ABLATE_KERNEL_CACHE", os.path.join(tmp_path, "kernels.json"))


@pytest.fixture(autouse=True, scope="session")
def _patched_once() -> None:
    """A launch patches triton.language; every call of a device function patched it again, a fifth of all time."""
    patch = interpreter._patch_lang

    def once(function: Any) -> Any:
        visible = [v for v in function.__globals__.values() if v is tl or v is tl.core]
        if visible and not any(tl.core.is_builtin(language.load) for language in visible):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = once


@pytest.fixture(autouse=True)
def _overflow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer sums are checked for overflow, over half of all time, where addresses are: test_races.py and `make soak`."""
    checked = "soak" in request.keywords or request.path.name == "test_races.py"
    options = interpreter.InterpreterOptions(sanitize_overflow=checked)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
