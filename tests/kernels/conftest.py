"""Spreads a backend's cases and dtypes over the methods of the contract it inherits."""

from __future__ import annotations

import pytest

from tests.kernels.contract import BackendContract


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `case` and `dtype` from the class variables of a `BackendContract`."""
    contract = metafunc.cls
    if contract is None or not issubclass(contract, BackendContract):
        return
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", contract.dtypes, ids=lambda t: str(t).removeprefix("torch."))
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", contract.cases, ids=str)
