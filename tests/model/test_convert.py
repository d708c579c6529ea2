"""Trees in place of trained MLPs: exact where they can be, close where neurons are placed by what they do, saved and loaded."""

# Longer than 400 lines because all of it converts models made by the helpers at its head.
from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.config import ConfigError, Corpus, Model, Train, Tree, Trial
from ablate.data.module import TokenData
from ablate.data.tokens import Prepared, prepare
from ablate.evaluation.bits_per_byte import bits_per_byte, logits_of
from ablate.model import neuron_placement
from ablate.model.convert import Conversion, Init, convert, from_pretrained, register
from ablate.model.mlps import DenseMlp, TreeMlp, find_mlps
from ablate.model.transformer import Transformer
from ablate.training.finetune import finetune
from tests.data.conftest import text

transformers = pytest.importorskip("transformers")

TREE = {"trees": 2, "depth": 3, "leaf_width": 4}
CONTEXT = 32


def build(
    kind: str, vocab_size: int, width: int = 32, blocks: int = 2, context: int = CONTEXT, dropout: float = 0.0
) -> Any:
    """A dense causal model of Hugging Face with random weights."""
    torch.manual_seed(0)
    common = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    heads = max(2, width // 32)
    shape: dict[str, Any]
    llama = {
        **common, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": context,
    }  # fmt: skip
    if kind == "gpt2":
        drop: dict[str, Any] = {"resid_pdrop": dropout, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_positions": context, "n_embd": width, "n_layer": blocks, "n_head": heads}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **drop, **common))
    elif kind == "opt":
        shape = {
            "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "num_hidden_layers": blocks,
            "num_attention_heads": heads, "max_position_embeddings": context, "dropout": 0.0,
        }  # fmt: skip
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**shape, **common))
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**llama))
    return model.eval()


def bpb(model: nn.Module, prepared: Prepared, context: int, tokens: int) -> float:
    data = TokenData(
        prepared, context=context, batch_size=1, data_seed=0, steps=1, eval_tokens=tokens, eval_batch_size=16
    )
    return bits_per_byte(model, data.val_dataloader(), torch.from_numpy(prepared.token_bytes.astype(np.int64)))


def windows(prepared: Prepared, context: int, count: int) -> Tensor:
    return torch.from_numpy(np.array(prepared.train[: context * count], dtype=np.int64)).view(count, context)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(200):
        (folder / f"{i:04d}.txt").write_text(text(i), encoding="utf-8")
    corpus = Corpus(source="files", path=str(folder), vocab_size=300, validation_share=0.2, test_share=0.1)
    return prepare(corpus, tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def trained(prepared: Prepared) -> Callable[[str], Any]:
    """A fresh copy of a briefly trained model of a kind."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = build(kind, prepared.vocab_size)
            finetune(made[kind], prepared, Train(steps=60, batch_size=8, lr=5e-3), context=CONTEXT)
        return copy.deepcopy(made[kind])

    return get


@pytest.fixture
def ids(prepared: Prepared) -> Tensor:
    return windows(prepared, CONTEXT, 64)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = logits_of(model, ids)
    return out


# --- depth 0


@pytest.mark.parametrize(("kind", "activation"), [("gpt2", "gelu_tanh"), ("opt", "relu")])
@pytest.mark.parametrize("trees", [1, 4])
def test_depth_0_gives_the_dense_logits(
    kind: str, activation: str, trees: int, trained: Callable[[str], Any], ids: Tensor
) -> None:
    model = trained(kind)
    with torch.no_grad():  # biases that matter, output bias included
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    before = logits(model, ids)
    tree = Tree.model_validate({"trees": trees, "depth": 0, "leaf_width": 128 // trees, "activation": activation})
    done = convert(model, tree=tree)
    assert all(layer.exact for layer in done.layers)
    assert sum(isinstance(m, TreeMlp) for m in model.modules()) == len(done.layers) == 2
    assert (logits(model, ids) - before).abs().max() <= 1e-5


def test_depth_0_gives_the_logits_of_our_own_dense_model(ids: Tensor) -> None:
    trial = Trial(model=Model(d_model=32, blocks=2, heads=2, context=CONTEXT, feedforward="dense"))
    model = Transformer(trial, 300).eval()
    before = logits(model, ids)
    done = ablate.convert(model, layers="blocks.*.feedforward", tree=Tree(trees=1, depth=0, leaf_width=128))
    assert [layer.name for layer in done.layers] == ["blocks.0.feedforward", "blocks.1.feedforward"]
    assert (logits(model, ids) - before).abs().max() <= 1e-5


# --- placement


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_placed_neurons_start_closer_than_shuffled_ones_and_those_than_random_weights(
    kind: str, trained: Callable[[str], Any], prepared: Prepared, ids: Tensor
) -> None:
    dense = bpb(trained(kind), prepared, CONTEXT, 2048)
    found: dict[str, tuple[Conversion, float]] = {}
    inits: tuple[Init, ...] = ("dense", "shuffled", "random")
    for init in inits:
        model = trained(kind)
        tree = Tree.model_validate({**TREE, "activation": find_mlps(model)[0].mlp.activation})
        found[init] = convert(model, tree=tree, init=init, calibration=ids), bpb(model, prepared, CONTEXT, 2048)
    errors = {init: [layer.error for layer in done.layers] for init, (done, _) in found.items()}
    for placed, shuffled, random in zip(*errors.values(), strict=True):
        assert placed < shuffled < random
    assert dense < found["dense"][1] < found["shuffled"][1] < found["random"][1]
    # Placed nodes halve the tokens they were fitted on; on others the leaves are still used more evenly than at random.
    usage = {init: [layer.n_eff_frac or 0.0 for layer in done.layers] for init, (done, _) in found.items()}
    assert all(placed > random for placed, random in zip(usage["dense"], usage["random"], strict=True))


def mlp(activation: str = "relu", width: int = 16, units: int = 64, gated: bool = False) -> DenseMlp:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])

    up: tuple[Tensor, ...] = (draw(units, width), draw(units)) if gated else ()
    return DenseMlp(draw(units, width), draw(units), draw(units, width), draw(width), activation, *up)  # type: ignore[arg-type]


def test_where_tokens_fall_into_groups_that_use_their_own_neurons_the_layer_is_all_but_exact() -> None:
    """Four far-off groups of tokens, four blocks of 8 neurons, each on for one group only: one tree of depth 2 fits."""
    g = torch.Generator().manual_seed(0)
    centres = 8 * torch.linalg.qr(torch.randn(16, 16, generator=g))[0][:4]
    group = torch.arange(4096) % 4
    x = centres[group] + torch.randn(4096, 16, generator=g)
    # A unit of group q sees its centre at 64 and the others' near 0: its bias of -20 keeps it off there.
    own = torch.arange(32) // 8
    w_in = centres[own] + 0.5 * torch.randn(32, 16, generator=g)
    dense = DenseMlp(
        w_in, torch.full((32,), -20.0), torch.randn(32, 16, generator=g), torch.randn(16, generator=g), "relu"
    )
    placed = neuron_placement.place(dense, Tree(trees=1, depth=2, leaf_width=8, activation="relu"), x)
    assert sorted(placed.neurons[0].flatten().tolist()) == list(range(32))
    assert all(len(set(own[leaf].tolist())) == 1 for leaf in placed.neurons[0])
    control = neuron_placement.place(dense, Tree(trees=1, depth=2, leaf_width=8, activation="relu"), x, shuffled=True)
    assert sorted(control.neurons[0].flatten().tolist()) == list(range(32))
    assert any(len(set(own[leaf].tolist())) > 1 for leaf in control.neurons[0])


@pytest.mark.parametrize("node_output", [True, False])
@pytest.mark.parametrize("gated", [False, True])
def test_placement_is_the_same_each_time_and_its_fit_is_that_of_the_layer(node_output: bool, gated: bool) -> None:
    dense, x = mlp(gated=gated), torch.randn(2048, 16, generator=torch.Generator().manual_seed(3))
    tree = Tree(trees=2, depth=3, leaf_width=4, activation="relu", node_output=node_output)
    one, two = (neuron_placement.place(dense, tree, x, seed=5) for _ in range(2))
    for a, b in zip(vars(one).values(), vars(two).values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.w_in[:, 7:], dense.w_in[one.neurons.flatten(1)])
    assert torch.equal(one.b[:, 7:], dense.b_in[one.neurons.flatten(1)])
    # A linear fit leaves no mean behind: what the real layer gives with these weights has the MLP's mean output.
    layer = ablate.TreeFeedForward(16, tree)
    with torch.no_grad():
        layer.w_in.copy_(one.w_in)
        layer.w_out.copy_(one.w_out)
        assert layer.b is not None
        layer.b.copy_(one.b)
        y = layer(x) + one.bias
    assert torch.allclose(y.mean(0), dense(x).mean(0), atol=1e-4)
    assert (y - dense(x)).square().sum() < (dense(x) - dense(x).mean(0)).square().sum()


@pytest.mark.parametrize("routing", [{"router": "frozen"}, {"router_input": "centred"}, {"routing": "centred"}])
def test_placed_nodes_decide_under_every_routing(
    routing: dict[str, str], trained: Callable[[str], Any], ids: Tensor
) -> None:
    errors = []
    for settings in ({}, routing):
        tree = Tree.model_validate({**TREE, "activation": "relu", **settings})
        errors.append(convert(trained("opt"), tree=tree, calibration=ids).error)
    assert errors[0] is not None
    assert errors[1] == pytest.approx(errors[0], rel=0.5 if "router_input" in routing else 1e-5)


# --- which modules


class Odd(nn.Module):
    """An MLP with a norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(nn.functional.layer_norm(self.up(x), (32,))))
        return y


class Functional(nn.Module):
    """An MLP whose activation is no module, and whose bias is absent."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.up(x)))
        return y


def plain(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), *middle, nn.Linear(32, 8))


@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (plain(nn.GELU()), "gelu"),
        (plain(nn.GELU("tanh")), "gelu_tanh"),
        (plain(nn.Tanh()), "tanh"),
        (Functional(), "silu"),
    ],
    ids=["gelu", "gelu_tanh", "tanh", "functional"],
)
def test_an_mlp_of_any_module_is_found_by_a_pattern_and_replaced_exactly(module: nn.Module, activation: str) -> None:
    model = nn.ModuleDict({"a": copy.deepcopy(module), "b": copy.deepcopy(module), "head": nn.Linear(8, 4)})
    x = torch.randn(50, 8)
    y = model["a"](x)
    tree = Tree.model_validate({"trees": 1, "depth": 0, "leaf_width": 32, "activation": activation})
    assert [layer.name for layer in convert(model, layers="a", tree=tree).layers] == ["a"]
    assert isinstance(model["a"], TreeMlp)
    assert not isinstance(model["b"], TreeMlp)
    assert (model["a"](x) - y).abs().max() <= 1e-6


def test_layers_are_chosen_by_place_or_by_name(trained: Callable[[str], Any], ids: Tensor) -> None:
    tree = Tree.model_validate({**TREE, "activation": "gelu_tanh"})
    by_place = convert(trained("gpt2"), layers=[-1], tree=tree, calibration=ids)
    by_name = convert(trained("gpt2"), layers=["transformer.h.1.mlp"], tree=tree, calibration=ids)
    assert [x.name for x in by_place.layers] == [x.name for x in by_name.layers] == ["transformer.h.1.mlp"]
    assert isinstance(by_place.model.get_submodule("transformer.h.1.mlp"), TreeMlp)
    assert not isinstance(by_place.model.get_submodule("transformer.h.0.mlp"), TreeMlp)


RELU: dict[str, Any] = {"trees": 1, "depth": 1, "leaf_width": 4, "activation": "relu"}


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (plain(nn.ReLU()), {"layers": "c*"}, "layers is 'c.': no module of ModuleDict has such a name"),
        (plain(nn.ReLU()), {"layers": [1]}, "layers has 1: the model has 1 MLPs, 0 to 0"),
        (nn.Linear(8, 8), {}, "layers: ModuleDict has no MLP that can be read"),
        (nn.Linear(8, 8), {"layers": "a"}, "module 'a' cannot be replaced: it has 0 projections"),
        (Odd(), {"layers": "a"}, "Odd computes something else than"),
        (plain(nn.ELU()), {"layers": "a"}, "Sequential computes something else than"),
        (plain(nn.ReLU(), nn.Dropout(0.1)), {"layers": "a"}, "it drops out hidden units"),
        (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), {"layers": "a"}, "do not go from one width"),
        (plain(nn.GELU()), {}, "tree.activation is 'relu': init 'dense' needs 'gelu'"),
        (plain(nn.ReLU()), {"tree": {"mirror": 0.5}}, "tree.mirror is 0.5: init 'dense' needs 0.0"),
        (plain(nn.ReLU()), {"tree": {"bias": False}}, "tree.bias is False: init 'dense' needs True"),
        (plain(nn.ReLU()), {"tree": {"placement": "sum"}}, "tree.placement is 'sum': init 'dense' needs 'unit'"),
        (plain(nn.ReLU()), {"tree": {"leaf_width": 33}}, "tree.leaf_width is 33: the MLP has 32 units"),
        (plain(nn.ReLU()), {}, "calibration is missing: init 'dense'"),
        (plain(nn.ReLU()), {"init": "random", "tree": {"init": "orthogonal"}}, "calibration is missing: init 'random'"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_said(module: nn.Module, settings: dict[str, Any], message: str) -> None:
    model = nn.ModuleDict({"a": copy.deepcopy(module)})
    tree = Tree.model_validate({**RELU, **settings.get("tree", {})})
    with pytest.raises(ConfigError, match=message):
        convert(model, **{**settings, "tree": tree})
    assert not any(isinstance(m, TreeMlp) for m in model.modules())


def test_too_few_tokens_are_refused(trained: Callable[[str], Any], ids: Tensor) -> None:
    tree = Tree(trees=1, depth=8, leaf_width=1, activation="gelu_tanh")
    with pytest.raises(ConfigError, match="calibration fits on 48 tokens: depth 8 needs at least 512"):
        convert(trained("gpt2"), tree=tree, calibration=ids[:2])


def test_a_tree_is_not_converted_again(trained: Callable[[str], Any], ids: Tensor) -> None:
    model = trained("gpt2")
    tree = Tree.model_validate({**TREE, "activation": "gelu_tanh"})
    convert(model, tree=tree, calibration=ids)
    with pytest.raises(ConfigError, match="has no MLP"):
        convert(model, tree=tree, calibration=ids)


def test_the_mlps_own_dropout_stays() -> None:
    model = build("gpt2", 300, dropout=0.5)
    done = convert(model, tree=Tree(trees=1, depth=0, leaf_width=128, activation="gelu_tanh"))
    layer = model.get_submodule(done.layers[0].name)
    x = torch.ones(400, 32)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert (layer(x) == 0).float().mean() == pytest.approx(0.5, abs=0.05)


# --- saving


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "qwen2"])
def test_a_converted_model_is_saved_and_loaded(
    kind: str, trained: Callable[[str], Any], ids: Tensor, tmp_path: Path
) -> None:
    model = trained(kind)
    first = find_mlps(model)[0]
    twin = Tree.model_validate({**TREE, "activation": first.mlp.activation, "routing": "centred"})
    convert(model, layers=[0], tree=twin, calibration=ids)
    # The second MLP in a second call, with another tree.
    convert(model, tree=Tree(trees=1, depth=2, leaf_width=3, activation=first.mlp.activation), calibration=ids)
    model.get_submodule(first.name).tree.thresholds.normal_()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"ablate_{kind}"
    assert (tmp_path / "model.safetensors").is_file()
    expected = logits(model, ids)
    for loaded in (from_pretrained(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is type(model) is register(saved["ablate"]["base_class"])
        assert torch.equal(logits(loaded.eval(), ids), expected)
        # Loading goes through memory that was never written; a first step must not see it.
        layer = loaded.get_submodule(first.name).tree
        assert not any(sums.any() for _, sums in layer.step_sums())
        loaded.train()(ids)
        layer.finish_step()
        assert layer.thresholds.isfinite().all()
    half = from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.get_submodule(first.name).tree.w_in.dtype == torch.bfloat16
    assert (logits(half, ids) - expected).abs().mean() < 0.1 * expected.std()


def test_generation_of_a_converted_model_is_cached_like_the_dense_ones(
    trained: Callable[[str], Any], ids: Tensor
) -> None:
    model = trained("gpt2")
    convert(model, tree=Tree.model_validate({**TREE, "activation": "gelu_tanh"}), calibration=ids)
    prompt = ids[:1, :4]
    outs = [
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, use_cache=cache
        )
        for cache in (True, False)
    ]
    assert torch.equal(outs[0], outs[1])


def test_a_dense_model_with_the_same_configuration_stays_dense(trained: Callable[[str], Any], tmp_path: Path) -> None:
    model = trained("gpt2")
    config = model.config
    convert(model, tree=Tree(trees=1, depth=0, leaf_width=128, activation="gelu_tanh"))
    assert config.model_type == "gpt2"
    assert not hasattr(config, "ablate")
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is not a converted model's configuration"):
        from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not exist: a folder written by save_pretrained"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="'Nonsense' is not a model class of transformers"):
        register("Nonsense")


# --- fine-tuning


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


@pytest.mark.parametrize("objective", ["tokens", "distill", "layers"])
def test_fine_tuning_improves_and_trains_what_it_should(
    objective: Any, trained: Callable[[str], Any], prepared: Prepared, ids: Tensor
) -> None:
    model, teacher = trained("opt"), trained("opt")
    settings = {**TREE, "activation": "relu", "routing": "centred"}
    convert(model, tree=Tree.model_validate(settings), init="shuffled", calibration=ids)
    start, before = bpb(model, prepared, CONTEXT, 2048), {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    losses = finetune(
        model, prepared, Train(steps=30, batch_size=8, lr=3e-3), context=CONTEXT, objective=objective,
        trainable="all" if objective == "tokens" else "trees", teacher=None if objective == "tokens" else teacher,
    )  # fmt: skip
    assert len(losses) == 30
    assert bpb(model, prepared, CONTEXT, 2048) < start
    trees = {n for n in before if ".tree." in n or n.endswith("fc1.bias")}
    assert trees <= changed(before, model)
    assert (changed(before, model) == trees) == (objective != "tokens")
    assert not changed(kept, teacher)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.get_submodule("model.decoder.layers.0.fc1").tree.thresholds.any()


def test_fine_tuning_asks_for_its_teacher(trained: Callable[[str], Any], prepared: Prepared, ids: Tensor) -> None:
    model = trained("opt")
    convert(model, tree=Tree.model_validate({**TREE, "activation": "relu"}), calibration=ids)
    with pytest.raises(ConfigError, match="teacher is missing: objective 'distill'"):
        finetune(model, prepared, Train(steps=1), context=CONTEXT, objective="distill")
    with pytest.raises(ConfigError, match=r"teacher has no MLP 'model.decoder.layers.0.fc1'"):
        finetune(model, prepared, Train(steps=1), context=CONTEXT, objective="layers", teacher=trained("gpt2"))


# --- the long version, with the figures of docs/convert.md


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_conversion_of_models_trained_on_the_default_corpus(kind: str, tmp_path: Path) -> None:
    """Nano-sized models: error, bpb after conversion and after 200 steps, against the dense model and its own 200 steps."""
    corpus = prepare(Corpus(), tmp_path)
    dense = build(kind, corpus.vocab_size, width=128, blocks=4, context=256)
    finetune(dense, corpus, Train(steps=600, batch_size=8, lr=2e-3 if kind == "gpt2" else 1e-3), context=256)
    ids = windows(corpus, 256, 64)
    further = Train(steps=200, batch_size=8, lr=5e-4)
    tree = Tree.model_validate(
        {"trees": 4, "depth": 5, "leaf_width": 3, "activation": find_mlps(dense)[0].mlp.activation}
    )
    rows: dict[str, tuple[float | None, float, float]] = {}
    more = copy.deepcopy(dense)
    finetune(more, corpus, further, context=256)
    rows["dense model"] = None, bpb(dense, corpus, 256, 65536), bpb(more, corpus, 256, 65536)
    inits: tuple[Init, ...] = ("dense", "shuffled", "random")
    for init in inits:
        model = copy.deepcopy(dense)
        done = convert(model, tree=tree, init=init, calibration=ids)
        after = bpb(model, corpus, 256, 65536)
        finetune(model, corpus, further, context=256)
        rows[init] = done.error, after, bpb(model, corpus, 256, 65536)
        print(f"\n{kind}, {init}\n{done}")
        assert init != "dense" or all(layer.n_eff_frac > 0.9 for layer in done.layers)  # type: ignore[operator]
    model = copy.deepcopy(dense)
    convert(model, tree=tree, calibration=ids)
    finetune(model, corpus, further, context=256, objective="distill", teacher=dense)
    rows["dense, distilled"] = rows["dense"][0], rows["dense"][1], bpb(model, corpus, 256, 65536)
    model = copy.deepcopy(dense)
    convert(model, tree=tree, calibration=ids)
    finetune(model, corpus, further, context=256, objective="layers", teacher=dense)
    rows["dense, layers"] = rows["dense"][0], rows["dense"][1], bpb(model, corpus, 256, 65536)
    print(f"\n{kind}: reconstruction error, bpb after conversion, bpb after 200 steps")
    for name, (error, converted, tuned) in rows.items():
        print(f"{name:18} {'' if error is None else f'{error:.4f}':>8} {converted:8.4f} {tuned:8.4f}")
    assert rows["dense"][0] < 0.5 * rows["shuffled"][0] < rows["random"][0]  # type: ignore[operator]
    assert rows["dense"][1] < rows["shuffled"][1] < rows["random"][1]
    assert rows["dense"][2] < rows["shuffled"][2] < rows["random"][2]
    assert rows["dense"][2] < rows["dense"][1]
