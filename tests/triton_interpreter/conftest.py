"""Tests of the Triton kernels in Triton's interpreter, on CPU tensors.

The interpreter must be chosen before triton is first imported, by anyone, so these run in processes of their own, which
tests/kernels/test_triton.py starts with TRITON_INTERPRET=1. Without it they are not collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

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
