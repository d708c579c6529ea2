"""The contenders of `ablate bench layer` compute what they are named after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.bench.contenders import CONTENDERS, DEFAULT, Shape, build, tokens
from ablate.bench.timing import calls_of

SHAPE = Shape(name="t", tokens=40, d=16, trees=2, depth=3, leaf_width=1)


def x() -> Tensor:
    return tokens(SHAPE, "iid", "cpu", torch.float32)


@pytest.mark.parametrize("name", [n for n in CONTENDERS if not n.endswith("_compiled") and n != "fastfeedforward"])
def test_every_contender_has_an_output_and_gradients_of_all_its_parameters(name: str) -> None:
    built = build(SHAPE, "cpu", torch.float32, [name])
    assert list(built) == list(dict.fromkeys(("tree", name)))
    assert built[name].call(x()).shape == (SHAPE.tokens, SHAPE.d)
    grads = calls_of(built, x(), "forward_backward")[name][0]()
    assert isinstance(grads, tuple)
    assert [g.shape for g in grads] == [x().shape, *(p.shape for p in built[name].parameters)]


def test_grouped_products_equal_the_loop_over_experts() -> None:
    built = {n: build(SHAPE, "cpu", torch.float32, [n])[n] for n in ("moe_top1", "moe_grouped")}
    for one, other in zip(built["moe_top1"].parameters, built["moe_grouped"].parameters, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(built["moe_grouped"].call(x()), built["moe_top1"].call(x()))


def test_ultrafastberts_layer_follows_its_algorithm_token_by_token() -> None:
    layer = build(SHAPE, "cpu", torch.float32, ["ultrafastbert"])["ultrafastbert"]
    w_in, b, w_out = (p.detach() for p in layer.parameters)
    want = torch.zeros(SHAPE.tokens, SHAPE.d)
    for n, row in enumerate(x()):
        for k in range(SHAPE.trees):
            node = 0
            for _ in range(SHAPE.depth + 1):
                z = row @ w_in[k, node] + b[k, node]
                want[n] += F.gelu(z) * w_out[k, node]
                node = 2 * node + 1 + int(z > 0)
    torch.testing.assert_close(layer.call(x()).detach(), want, atol=1e-5, rtol=1e-5)


def test_the_slow_package_is_measured_only_when_it_is_asked_for() -> None:
    assert "fastfeedforward" not in DEFAULT
    assert set(DEFAULT) < set(CONTENDERS)
