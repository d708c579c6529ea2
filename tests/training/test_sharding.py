"""How a model is sharded, by one process of a group that has no others (the whole trial is in test_ranks)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from ablate import TreeFeedForward
from ablate.balance.probe import look
from ablate.config import Tree, Trial
from ablate.distributed import whole
from ablate.kernels.cpu.host import view
from ablate.model.transformer import Transformer
from ablate.training.sharding import gathered, shard

RANKS = 4


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield init_device_mesh("cpu", (RANKS,))
    torch.distributed.destroy_process_group()


def model(d_model: int) -> Transformer:
    settings = {"d_model": d_model, "heads": 1, "blocks": 2, "context": 8}
    return Transformer(Trial.model_validate({"model": settings, "tree": {"trees": 3, "depth": 2}}), 32)


def test_every_weight_is_cut_along_d_where_the_processes_divide_it(mesh: DeviceMesh) -> None:
    net = model(16)
    shard(net, mesh)
    [tree, _] = net.trees()
    for weight in (tree.w_in, tree.w_out):
        assert isinstance(weight, DTensor)
        assert weight.placements == (Shard(2),)
        assert weight.to_local().shape[-1] == 16 // RANKS
    assert all(isinstance(p, DTensor) for p in net.parameters())
    odd = model(18)
    shard(odd, mesh)
    weight = odd.trees()[0].w_in
    assert isinstance(weight, DTensor)
    assert weight.placements == (Shard(0),), "18 numbers are not cut in 4"


def collectives(net: Transformer) -> int:
    """How often a forward pass and gradients of its layers' outputs wait for other processes."""
    with CommDebugMode() as seen:  # type: ignore[no-untyped-call]
        look(net, net.trees(), torch.zeros(1, 5, dtype=torch.int64))
    return sum(seen.get_comm_counts().values())


def test_gathered_weights_are_plain_and_whole_and_wait_for_nobody(mesh: DeviceMesh) -> None:
    net = model(16)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    shard(net, mesh)
    assert collectives(net) > 0
    with gathered(net):
        for _ in range(2):  # a pass does not shard them again
            assert {name: p.shape for name, p in net.named_parameters()} == shapes
            assert not any(isinstance(p, DTensor) for p in net.parameters())
            assert collectives(net) == 0
    assert all(isinstance(p, DTensor) for p in net.parameters())
    assert collectives(net) > 0


@pytest.mark.parametrize(
    ("tree", "reductions"), [(Tree(), 0), (Tree(routing="centred"), 1), (Tree(router_input="centred"), 1)]
)
def test_a_step_adds_up_over_processes_only_what_its_settings_need(
    tree: Tree, reductions: int, mesh: DeviceMesh
) -> None:
    layer = TreeFeedForward(16, tree)
    layer(torch.randn(5, 16))
    with CommDebugMode() as seen:  # type: ignore[no-untyped-call]
        layer.finish_step()
    assert sum(seen.get_comm_counts().values()) == reductions


def test_a_model_that_is_whole_stays_as_it_is() -> None:
    net = model(16)
    with gathered(net):
        assert whole(net.embedding) is net.embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64, torch.bool])
def test_a_view_by_address_is_the_tensor_and_leaves_its_storage_resizable(dtype: torch.dtype) -> None:
    for t in (torch.arange(24).view(2, 3, 4).to(dtype), torch.arange(24).view(2, 3, 4).to(dtype).transpose(0, 2)):
        seen = view(t)
        assert (seen == t.clone().numpy()).all()
        assert seen.strides == tuple(s * t.element_size() for s in t.stride())
        seen[...] = 0
        assert not t.any()
        assert t.untyped_storage().resizable()
    assert view(torch.empty(0, 3, dtype=dtype)).shape == (0, 3)
