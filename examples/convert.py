"""Replace the MLPs of a Hugging Face model by trees, save it, and load it again.

The model is made from a configuration with random weights, so nothing is downloaded; a trained one works the same way.
Needs the extra `qa` (transformers). Run it with `python examples/convert.py`; it takes some seconds on one core.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import OPTConfig, OPTForCausalLM

import ablate


def main() -> None:
    """Convert, report how far each layer is off, and compare the logits before saving and after loading."""
    torch.manual_seed(0)
    shape = OPTConfig(
        vocab_size=512,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = OPTForCausalLM(shape).eval()
    ids = torch.randint(4, 512, (64, 64))  # real text, for a trained model

    tree = ablate.Tree(trees=2, depth=3, leaf_width=3, activation="relu")  # the activation of OPT
    print(ablate.convert(model, tree=tree, init="dense", calibration=ids))

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        before = model(ids[:4]).logits
        model.save_pretrained(folder)
        after = ablate.from_pretrained(folder).eval()(ids[:4]).logits
    print(f"largest difference of the logits after saving and loading: {(before - after).abs().max():g}")


if __name__ == "__main__":
    main()
