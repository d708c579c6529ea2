"""The layer outside training: other widths, dtypes and derivatives are computed, or said in plain words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ablate import TreeFeedForward
from ablate.model.ragged import keep

D = 12


def layer(**settings: Any) -> TreeFeedForward:
    torch.manual_seed(0)
    return TreeFeedForward(D, **{"trees": 2, "depth": 2, "leaf_width": 3, **settings})


def ragged() -> nn.Module:
    living = np.ones((2, 4), dtype=bool)
    living[0, 1] = False
    return keep(layer(), living)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "plain": layer,
    "frozen": lambda: layer(router="frozen"),
    "centred": lambda: layer(router_input="centred"),
    "flip": lambda: layer(node_backward="flip"),
    "sum": lambda: layer(placement="tree"),
    "ragged": ragged,
}
PLAIN = [name for name in KINDS if name != "reference"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, D - 1), f"the input has {D - 1} features, the layer takes {D}: its shape is (4, {D - 1})"),
        (torch.zeros(2, 3, D + 1), f"the input has {D + 1} features, the layer takes {D}"),
        (torch.zeros(4, 0), f"the input has 0 features, the layer takes {D}"),
        (torch.zeros(()), "the input has no features"),
        (torch.zeros(4, D, dtype=torch.int64), "the input is torch.int64: floating-point numbers are expected"),
        (torch.zeros(4, D, dtype=torch.bool), "the input is torch.bool"),
        (torch.zeros(4, D, dtype=torch.complex64), "the input is torch.complex64"),
        (torch.zeros(4, D, dtype=torch.float64), "the input is torch.float64, the layer torch.float32"),
        (torch.zeros(4, D, dtype=torch.bfloat16), "the input is torch.bfloat16, the layer torch.float32"),
        (torch.zeros(4, D, device="meta"), "the input is on meta, the layer on cpu"),
    ],
    ids=lambda v: f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else "",
)
def test_an_input_that_does_not_fit_blames_the_input(kind: str, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"^the input ") as error:
        KINDS[kind]()(x)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_tokens_and_axes_is_computed(kind: str) -> None:
    net = KINDS[kind]()
    x = torch.randn(2, 3, D)
    whole = net(x)
    assert torch.equal(net(x.reshape(-1, D)).view_as(x), whole)
    assert torch.equal(net(x[0, 0]), net(x[0, :1])[0])
    assert net(x[:0]).shape == (0, 3, D)


def test_calibration_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the input has 11 features, the layer takes 12"):
        layer(router_input="centred").calibrate(torch.zeros(5, D - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_takes_any_floating_point(kind: str) -> None:
    net = KINDS[kind]()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert net(torch.randn(4, D, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_is_refused_in_plain_words(kind: str) -> None:
    net, x = KINDS[kind](), torch.randn(5, D, requires_grad=True)
    [g] = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative") as error:
        torch.autograd.grad(g.sum(), x)
    assert "backend='reference'" in str(error.value)
    loss = net(x).square().sum()
    gradients = torch.autograd.grad(loss, list(net.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(torch.stack([p.square().sum() for p in gradients if p is not None]).sum(), x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_made_to_be_differentiated_is_the_same_gradient(kind: str) -> None:
    net, x = KINDS[kind](), torch.randn(5, D, requires_grad=True)
    [plain] = torch.autograd.grad(net(x).square().sum(), x)
    [kept] = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    assert torch.equal(plain, kept)


def dual(net: nn.Module, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))  # type: ignore[no-untyped-call]


def dual_weight(net: nn.Module, x: Tensor) -> None:
    weights = {n: p.detach() for n, p in net.named_parameters()}
    torch.func.jvp(lambda w: torch.func.functional_call(net, w, (x,)), (weights,), (weights,))


FORWARD: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "dual": dual,
    "weights": dual_weight,
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda net, x: torch.func.jacfwd(net)(x),
    "hessian": lambda net, x: torch.func.hessian(lambda v: net(v).sum())(x),
    "hvp": lambda net, x: torch.autograd.functional.hvp(lambda v: net(v).sum(), x, x),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", FORWARD)
def test_forward_mode_and_hessians_raise_instead_of_giving_zero(way: str, kind: str) -> None:
    with pytest.raises(RuntimeError):
        FORWARD[way](KINDS[kind](), torch.randn(3, D))


@pytest.mark.parametrize("way", ["dual", "jvp", "jacfwd", "hvp"])
def test_plain_pytorch_has_the_derivatives_that_kernels_lack(way: str) -> None:
    FORWARD[way](layer(backend="reference"), torch.randn(3, D))


def test_the_reference_has_second_derivatives_that_agree_with_differences() -> None:
    net = layer(backend="reference").double()
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: net(v), (x,), atol=1e-4)
