"""Models whose MLPs are shared, patched, not finite, zero or without data: converted whole, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.config import ConfigError, Tree
from ablate.model.convert import convert, from_pretrained
from ablate.model.mlps import TreeMlp, find_mlps

D, UNITS = 8, 24
TREE = Tree(trees=2, depth=1, leaf_width=4, activation="gelu")
TOKENS = torch.randn(64, D, generator=torch.Generator().manual_seed(1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, UNITS), nn.GELU(), nn.Linear(UNITS, D)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.act(self.up(x)))


class Functional(Mlp):
    def __init__(self) -> None:
        super().__init__()
        del self.act

    def forward(self, x: Tensor) -> Any:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Any:
        return x + self.mlp(x)


def model(mlps: list[nn.Module] | None = None) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(mlp) for mlp in mlps or [Mlp(), Mlp(), Mlp()]))


def kinds(net: Any) -> list[bool]:
    return [isinstance(block.mlp, TreeMlp) for block in net]


def refused(net: nn.Module, **arguments: Any) -> str:
    before = copy.deepcopy({k: v for k, v in net.state_dict().items() if not v.is_meta})
    with pytest.raises(ConfigError) as error:
        convert(net, **{"tree": TREE, "calibration": TOKENS, **arguments})
    assert "\n" not in str(error.value)
    after = net.state_dict()
    assert all(torch.equal(v, after[k]) or not v.isfinite().all() for k, v in before.items()), "the model is as it was"
    return str(error.value)


def test_every_mlp_goes_where_all_can_be_read() -> None:
    net = model()
    convert(net, tree=TREE, calibration=TOKENS)
    assert kinds(net) == [True] * 3


# --- shared


def test_an_mlp_in_two_places_is_refused_with_both_names() -> None:
    one = Mlp()
    for layers in (None, [0], "0.mlp", [-1]):
        net = model([one, Mlp(), one])
        if layers == [-1]:
            convert(net, tree=TREE, calibration=TOKENS, layers=layers)
            assert kinds(net) == [False, True, False], "what is not asked for may be shared"
        else:
            assert "'0.mlp' and '2.mlp' are one module" in refused(net, layers=layers)


def test_a_block_that_is_used_twice_is_converted_on_the_tokens_of_both_uses() -> None:
    block = Block(Mlp())
    net = nn.Sequential(block, block)
    found = convert(net, tree=TREE, calibration=TOKENS)
    assert kinds(net) == [True, True]
    assert net[0] is net[1]
    assert len(found.layers) == 1


@pytest.mark.parametrize("part", ["up", "down"])
def test_mlps_that_share_a_weight_are_refused(part: str) -> None:
    net = model()
    getattr(net[2].mlp, part).weight = getattr(net[0].mlp, part).weight
    assert f"'0.mlp' shares a weight with '2.mlp.{part}.weight'" in refused(net)
    tied: Any = nn.ModuleDict({"head": nn.Linear(D, UNITS), "net": model()})
    tied["head"].weight = tied["net"][1].mlp.up.weight
    with pytest.raises(ConfigError, match=r"'net\.1\.mlp' shares a weight with 'head\.weight'"):
        find_mlps(tied)


# --- patched


def adapter(net: Any) -> None:
    own = net[0].mlp.up.forward
    net[0].mlp.up.forward = lambda x: own(x) + 1


def hook(net: Any) -> None:
    net[0].mlp.register_forward_hook(lambda _m, _x, y: y * 2)


def wrapped(net: Any) -> None:
    class Lora(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.base, self.a, self.b = inner, nn.Linear(D, 2), nn.Linear(2, UNITS)

        def forward(self, x: Tensor) -> Any:
            return self.base(x) + self.b(self.a(x))

    net[0].mlp.up = Lora(net[0].mlp.up)


def other_activation(net: Any) -> None:
    net[0].mlp.act = nn.Softplus()


def hidden_dropout(net: Any) -> None:
    net[0].mlp.act = nn.Sequential(nn.GELU(), nn.Dropout(0.1), nn.ELU())


def quantised(net: Any) -> None:
    net[0].mlp.up.weight = nn.Parameter(torch.ones(UNITS, D, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("patch", [adapter, hook, wrapped, other_activation, hidden_dropout, quantised])
def test_an_mlp_that_cannot_be_read_is_named_and_keeps_its_place(patch: Callable[[Any], None]) -> None:
    for layers in (None, [0], [0, 1], "*.mlp", "0.mlp"):
        net = model()
        patch(net)
        assert "'0.mlp' cannot be replaced" in refused(net, layers=layers)
    net = model()
    patch(net)
    with pytest.raises(ConfigError, match=r"layers has 3: the model has 3 MLPs"):
        find_mlps(net, [3])
    convert(net, tree=TREE, layers=[1], init="random")
    assert kinds(net) == [False, True, False]


# --- not finite, zero, without data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["up.weight", "up.bias", "down.weight", "down.bias"])
def test_weights_that_are_not_finite_are_refused(part: str, value: float) -> None:
    for mlp in (Mlp(), Functional()):
        net = model([Mlp(), mlp])
        with torch.no_grad():
            net.get_parameter(f"1.mlp.{part}").view(-1)[0] = value
        assert "'1.mlp' cannot be replaced: its weights are not finite" in refused(net)


def test_calibration_that_is_not_finite_is_refused() -> None:
    tokens = TOKENS.clone()
    tokens[3, 2] = float("nan")
    assert "calibration: the model's own inputs of '0.mlp' are not finite" in refused(model(), calibration=tokens)


@pytest.mark.parametrize("part", [["down"], ["up"], ["up", "down"]])
@pytest.mark.parametrize("init", ["dense", "random", "shuffled"])
def test_zero_weights_are_read_by_the_modules_own_activation(part: list[str], init: Any) -> None:
    for activation, expected in ((nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), "relu")):
        net = model([Mlp()])
        net[0].mlp.act = activation
        for name in part:
            nn.init.zeros_(getattr(net[0].mlp, name).weight)
        nn.init.zeros_(net[0].mlp.up.bias)
        assert find_mlps(net)[0].mlp.activation == expected
        tree = TREE.model_copy(update={"activation": expected})
        convert(net, tree=tree, calibration=TOKENS, init=init)
        assert all(bool(p.isfinite().all()) for p in net.parameters())
        assert bool(net(TOKENS).isfinite().all())


def test_zero_weights_without_an_activation_of_their_own_are_named() -> None:
    net = model([Functional(), Functional()])
    nn.init.zeros_(net[1].mlp.down.weight)
    assert "'1.mlp' cannot be replaced: its weights are zero" in refused(net)
    convert(net, tree=TREE, calibration=TOKENS, layers=[0])
    assert kinds(net) == [True, False]


@pytest.mark.parametrize("part", ["", "1.mlp", "0.mlp.up"])
def test_a_model_without_data_is_refused(part: str) -> None:
    net = model()
    net.get_submodule(part).to("meta") if part else net.to("meta")
    for init in ("dense", "random"):
        assert "has weights on 'meta', without data" in refused(net, init=init)


def test_a_shared_mlp_of_transformers_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    net = transformers.GPT2LMHeadModel(config)
    net.transformer.h[1].mlp = net.transformer.h[0].mlp
    assert "'transformer.h.0.mlp' and 'transformer.h.1.mlp' are one module" in refused(net, init="random")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b"\xff", "is not text in UTF-8"),
        (b"", "is not JSON"),
        (b"[]", "is not a converted model's configuration"),
        (b'{"ablate": 3}', "is not a converted model's configuration"),
        (b'{"ablate": {"base_class": "NoSuch"}}', "'NoSuch' is not a model class"),
        (b'{"ablate": {"base_class": ["x"]}}', "is not a model class"),
    ],
    ids=lambda c: ascii(c[:12]),
)
def test_a_folder_that_is_no_converted_model_is_one_line(content: bytes, message: str, tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        from_pretrained(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
