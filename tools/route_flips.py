"""Measure how many routes bfloat16 changes against float32, for docs/convert.md."""

from __future__ import annotations

import torch

from ablate import TreeFeedForward

WIDTH, TOKENS, DEPTHS = 256, 4096, (3, 6, 9)


def main() -> None:
    """Print a row a depth: share of routes and of tokens that change, and differences of the output over its spread."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator) + 0.7 * torch.randn(WIDTH, generator=generator)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    for depth in DEPTHS:
        generator = torch.Generator().manual_seed(1)
        layer = TreeFeedForward(WIDTH, trees=4, depth=depth, leaf_width=4, generator=generator).eval()
        with torch.no_grad():
            y, leaves = layer(x), layer.last_leaves
            with torch.autocast("cpu", torch.bfloat16):
                layer(x)
            cast = layer.last_leaves
            z, found = layer.to(torch.bfloat16)(x.bfloat16()).float(), layer.last_leaves
        assert leaves is not None
        assert found is not None
        assert cast is not None
        changed = leaves != found
        kept = ~changed.any(1)
        spread = y.std()
        print(
            f"depth {depth}: routes {changed.float().mean():.2%} (autocast {(leaves != cast).float().mean():.2%}), tokens "
            f"{1 - kept.float().mean():.1%}, difference {(z - y).square().mean().sqrt() / spread:.3f}, "
            f"of tokens without a change {(z - y)[kept].square().mean().sqrt() / spread:.3f}"
        )


if __name__ == "__main__":
    main()
