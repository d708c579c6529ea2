"""The layer in other people's models: PyTorch's encoder, the Auto classes of a fresh process, wrong inputs."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ablate
from ablate.config import ConfigError


@pytest.mark.parametrize("masked", [False, True])
def test_a_tree_in_an_encoder_works_in_eval_mode_too(masked: bool) -> None:
    """A tree of depth 0 is the dense layer, so that its output is known; with a mask the encoder nests its tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 2)
    dense = copy.deepcopy(encoder).eval()
    ablate.convert(encoder, tree=ablate.Tree(trees=1, depth=0, leaf_width=32))
    x, kept = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    if masked:
        kept[1, 3:] = False
    mask = ~kept if masked else None
    encoder.train()(x, src_key_padding_mask=mask).sum().backward()
    with torch.no_grad():
        found, wanted = encoder.eval()(x, src_key_padding_mask=mask), dense(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-5, atol=1e-5)


def test_an_encoder_that_drops_hidden_units_is_refused_with_the_setting() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1)
    with pytest.raises(ConfigError, match=r"set dropout\.p to 0 first"):
        ablate.convert(encoder, layers="layers.0")


def test_an_input_of_another_type_or_width_is_the_inputs_fault() -> None:
    layer = ablate.TreeFeedForward(16, trees=2, depth=2, leaf_width=2)
    with pytest.raises(ValueError, match=r"the input is torch\.float64, the layer torch\.float32"):
        layer(torch.randn(3, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"the input has 15 features, the layer takes 16"):
        layer(torch.randn(3, 15))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize("order", ["import ablate, transformers", "import transformers, ablate"])
def test_importing_the_package_is_enough_for_the_auto_classes(order: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    ablate.convert(model, tree=ablate.Tree(trees=1, depth=0, leaf_width=64, activation="gelu_tanh"))
    model.save_pretrained(tmp_path)
    torch.save(model(torch.arange(8)[None]).logits.detach(), tmp_path / "logits.pt")
    code = (
        f"{order}\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('.').eval()\n"
        "print(type(model).__name__, torch.equal(model(torch.arange(8)[None]).logits, torch.load('logits.pt')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "TreeGPT2LMHeadModel True", done.stderr[-2000:]
