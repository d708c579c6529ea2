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
    """A launch patches triton.language; every call of a device function patched it again, a fifth of all time.

    Safe to leave out: the nested patch only replaces what the launch's own has replaced by the same.
    """
    import triton.language as tl  # type: ignore[import-untyped]
    import triton.runtime.interpreter as interpreter  # type: ignore[import-untyped]

    patch = interpreter._patch_lang

    def once(function: Any) -> Any:
        visible = [v for v in function.__globals__.values() if v is tl or v is tl.core]
        if visible and not any(tl.core.is_builtin(language.load) for language in visible):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = once


@pytest.fixture
def checks_overflow() -> None:
    """Asked for by tests in which integer sums, differences and products are checked for overflow."""


@pytest.fixture(autouse=True)
def _overflow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check takes over half of all time: it is made where it is asked for, and in `make soak`.

    The interpreter's own default computes it and, without `debug`, drops what it found.
    """
    import triton.runtime.interpreter as interpreter

    checked = "soak" in request.keywords or "checks_overflow" in request.fixturenames
    options = interpreter.InterpreterOptions(debug=checked, sanitize_overflow=checked)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
