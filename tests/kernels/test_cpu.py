"""The CPU backend: the shared contract at one and two threads, and what is its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.contract import BackendContract


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
class TestOneThread(BackendContract):
    backend = "cpu"
    dtypes = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.usefixtures("two_threads")
class TestTwoThreads(BackendContract):
    backend = "cpu"
    dtypes = (torch.float32, torch.float64)
