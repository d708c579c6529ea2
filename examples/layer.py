"""Train a small torch model whose hidden layer is a tree layer, and see how evenly its leaves are used before and after.

Run it with `python examples/layer.py`; it takes a few seconds on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablate import TreeFeedForward
from ablate.balance.metrics import dead_frac, leaf_counts, n_eff_frac

WIDTH, CLASSES, STEPS = 32, 8, 150


class Classifier(nn.Module):
    """A residual tree layer and a linear readout."""

    def __init__(self, routing: str) -> None:
        super().__init__()
        self.tree = TreeFeedForward(WIDTH, trees=2, depth=4, leaf_width=2, activation="gelu", routing=routing)
        self.readout = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the classes' logits [N, CLASSES] of points [N, WIDTH]."""
        logits: Tensor = self.readout(x + self.tree(x))
        return logits


def points(count: int, centres: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw points [N, WIDTH] around the centres of their classes [N]."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return centres[labels] + torch.randn(count, WIDTH, generator=generator), labels


def balance(model: Classifier, x: Tensor) -> str:
    """Say which share of the leaves is in effective use and which is dead, the mean over trees."""
    model.eval()
    with torch.no_grad():
        model(x)
    assert model.tree.last_leaves is not None
    counts = leaf_counts(model.tree.last_leaves.T.numpy(), model.tree.spec.leaves)  # [K, L]
    return f"{n_eff_frac(counts).mean():.2f} of the leaves in effective use, {dead_frac(counts).mean():.0%} dead"


def main() -> None:
    """Train the same model with each routing, on the same points."""
    for routing in ("sign", "centred"):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        centres = 1 + torch.randn(CLASSES, WIDTH, generator=generator)  # a common mean tips nodes to one side
        held_out, answers = points(16384, centres, generator)
        model = Classifier(routing)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        print(f"routing {routing}, before training: {balance(model, held_out)}")
        model.train()
        for _ in range(STEPS):
            x, labels = points(512, centres, generator)
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.tree.finish_step()  # moves the thresholds of `centred`; does nothing for `sign`
        print(f"routing {routing}, after training:  {balance(model, held_out)}")
        right = (model(held_out).argmax(-1) == answers).float().mean()
        print(f"routing {routing}, accuracy:        {right:.1%}")


if __name__ == "__main__":
    main()
