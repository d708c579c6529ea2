"""Compile the CPU kernels that training calls: `python -m ablate.kernels.cpu.warm`. Numba keeps them on disk."""

from __future__ import annotations

import torch

from ablate.kernels.op import tree_feedforward
from ablate.kernels.spec import TreeSpec


def main() -> None:
    """Run a small layer forward and backward; does nothing where a GPU trains."""
    if torch.cuda.is_available():
        return
    spec = TreeSpec(trees=1, depth=2, leaf_width=1)
    x, w_in, b, w_out = (
        torch.ones(shape, requires_grad=True)
        for shape in ((8, 16), (1, spec.in_rows, 16), (1, spec.in_rows), (1, 7, 16))
    )
    torch.autograd.grad(tree_feedforward(x, w_in, b, w_out, spec).y.sum(), (x, w_in, b, w_out))


if __name__ == "__main__":
    main()
