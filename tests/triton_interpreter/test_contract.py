"""The shared contract on the tiles strategy; the other strategies, bf16 and fp16 are compared with the reference.

The interpreter takes a second or two for a case, so outside the tiles strategy cases are dealt out.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ablate.kernels.triton import backend as launch
from ablate.kernels.triton.tiling import Strategy
from tests.kernels.contract import CASES, BackendContract, Case, check


class TestTiles(BackendContract):
    backend = "triton"

    @pytest.fixture(autouse=True)
    def _tiles(self) -> Iterator[None]:
        with launch.using(strategy="tiles", always_tile=True):
            yield


@pytest.mark.parametrize(
    ("strategy", "dtype", "case"),
    [
        *(pytest.param("gather", torch.float32, c, id=f"gather-{c}") for c in CASES[1::4]),
        *(pytest.param("masked", torch.float32, c, id=f"masked-{c}") for c in CASES[2::4]),
        *(pytest.param("tiles", torch.bfloat16, c, id=f"bf16-tiles-{c}") for c in CASES[::6]),
        *(pytest.param("tiles", torch.float16, c, id=f"fp16-tiles-{c}") for c in CASES[::12]),
        *(pytest.param("gather", torch.bfloat16, c, id=f"bf16-gather-{c}") for c in CASES[3::12]),
    ],
)
def test_agrees_with_the_reference(strategy: Strategy, dtype: torch.dtype, case: Case) -> None:
    with launch.using(strategy=strategy, always_tile=True):
        check(case, "triton", dtype)
