"""The Triton backend on a GPU: the contract on every strategy, the paper's scale, repeatability, capture, measured tuning.

Skips where there is no CUDA or ROCm device. `pytest -m gpu` runs this; then `ablate bench layer --device cuda` times it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ablate.kernels.op import tree_feedforward
from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton import backend as launch
from ablate.kernels.triton import tuned
from ablate.kernels.triton.tiling import STRATEGIES, Strategy
from ablate.kernels.triton.tune import tune
from ablate.model.routing import node_sums
from tests.kernels.conftest import pytest_generate_tests
from tests.kernels.contract import BackendContract, Case, Layer, check

__all__ = ["pytest_generate_tests"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


class GpuContract(BackendContract):
    backend = "triton"
    device = "cuda"
    dtypes = (torch.float32, torch.bfloat16)
    strategy: Strategy

    @pytest.fixture(autouse=True)
    def _one_strategy(self) -> Iterator[None]:
        with launch.using(strategy=self.strategy, always_tile=True):
            yield


class TestTiles(GpuContract):
    strategy = "tiles"


class TestGather(GpuContract):
    strategy = "gather"


class TestMasked(GpuContract):
    strategy = "masked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, None])
@pytest.mark.parametrize(
    ("depth", "leaf_width", "trees", "placement"),
    [(7, 1, 2, "unit"), (10, 16, 1, "tree"), (12, 1, 2, "sum"), (13, 3, 1, "unit"), (3, 100, 2, "unit")],
)
def test_large_layers(
    depth: int, leaf_width: int, trees: int, placement: str, strategy: Strategy | None, dtype: torch.dtype
) -> None:
    spec = TreeSpec(trees=trees, depth=depth, leaf_width=leaf_width, placement=placement)  # type: ignore[arg-type]
    with launch.using(strategy=strategy):
        check(Case(why="large", tokens=1000, d=200, spec=spec, thresholds=True), "triton", dtype, "cuda")


@pytest.mark.parametrize("place", [0, 1])
def test_every_shipped_configuration(place: int) -> None:
    named = tuple((kernel, place) for kernel in ("tile_dots", "spread", "tile_wgrad", "row_dots"))
    spec = TreeSpec(trees=2, depth=9, leaf_width=2)
    for strategy in STRATEGIES:
        with launch.using(strategy=strategy, config=named):
            check(Case(why="configuration", tokens=700, d=320, spec=spec), "triton", torch.bfloat16, "cuda")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("hot", [False, True])
def test_repeats_bitwise_at_scale(strategy: Strategy, hot: bool) -> None:
    """Races and float atomics show here, where the interpreter cannot show them."""
    spec = TreeSpec(trees=4, depth=11, leaf_width=1)
    layer = Layer.of(Case(why="repeat", tokens=8192, d=768, spec=spec, hot=hot), torch.bfloat16, "cuda")
    with launch.using(strategy=strategy):
        first, first_grads = layer.call("triton")
        for _ in range(5):
            again, grads = layer.call("triton")
            assert torch.equal(first.y, again.y)
            assert torch.equal(first.leaves, again.leaves)
            for name, grad in grads.items():
                assert torch.equal(first_grads[name], grad), name


def test_a_pass_can_be_captured_in_a_graph() -> None:
    """No launch waits for the device or depends on its data, so a captured pass follows new tokens."""
    spec = TreeSpec(trees=2, depth=8, leaf_width=1)
    layer = Layer.of(Case(why="graph", tokens=512, d=256, spec=spec), torch.bfloat16, "cuda")
    arguments: tuple[Any, ...] = (layer.w_in, layer.b, layer.w_out, spec)
    x = layer.x.clone()
    with torch.no_grad():
        tree_feedforward(x, *arguments, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = tree_feedforward(x, *arguments, backend="triton")
        x.copy_(layer.x.flip(0))
        graph.replay()
        want = tree_feedforward(layer.x.flip(0), *arguments, backend="triton")
    assert torch.equal(out.leaves, want.leaves)
    assert torch.equal(out.y, want.y)


def test_sums_of_centred_routing_repeat_bitwise_and_can_be_captured() -> None:
    leaves = torch.randint(0, 64, (10_000, 4), dtype=torch.int32, device="cuda")
    z = torch.randn(10_000, 4, 6, device="cuda")
    first = node_sums(leaves, z)
    assert torch.equal(node_sums(leaves, z), first)
    torch.testing.assert_close(first.cpu(), node_sums(leaves.cpu(), z.cpu()), rtol=1e-4, atol=1e-3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = node_sums(leaves, z)
    graph.replay()
    assert torch.equal(again, first)


def test_memory_kept_for_backward_is_leaves_and_path_responses() -> None:
    spec = TreeSpec(trees=1, depth=12, leaf_width=1)
    layer = Layer.of(Case(why="memory", tokens=8192, d=256, spec=spec), torch.bfloat16, "cuda")
    x, w_in, w_out = (t.requires_grad_() for t in (layer.x, layer.w_in, layer.w_out))
    y = tree_feedforward(x, w_in, None, w_out, spec, backend="triton").y  # first call: compilation and its buffers
    del y
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = tree_feedforward(x, w_in, None, w_out, spec, backend="triton").y
    kept = torch.cuda.memory_allocated() - before
    assert kept <= y.numel() * 2 + 8192 * (4 + 4 * spec.path) + 4096


def test_tuning_records_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLATE_KERNEL_CACHE", str(tmp_path / "kernels.json"))
    spec = TreeSpec(trees=1, depth=10, leaf_width=1)
    entry = tune(spec, 4096, 768)
    assert 0 < entry.seconds < 1
    assert tuned.lookup(torch.cuda.get_device_name(), spec, 4096, 768, "bf16") == entry
    launch.forget_choices()
