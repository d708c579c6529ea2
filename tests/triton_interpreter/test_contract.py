"""The shared contract on each of the three routes; the interpreter takes about a second for a case, so some share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ablate.kernels import launch
from ablate.kernels.plan import Route
from tests.kernels.contract import CASES, BackendContract


class TritonContract(BackendContract):
    backend = "triton"
    route: Route

    @pytest.fixture(autouse=True)
    def _one_route(self) -> Iterator[None]:
        with launch.using(route=self.route, always_tile=True):
            yield


class TestTiles(TritonContract):
    route = "tiles"


class TestTilesInBfloat16(TritonContract):
    route = "tiles"
    dtypes = (torch.bfloat16,)
    cases = CASES[::6]


class TestGather(TritonContract):
    route = "gather"
    cases = CASES[1::4]


class TestMasked(TritonContract):
    route = "masked"
    cases = CASES[2::4]
