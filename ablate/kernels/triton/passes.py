"""The launches of one forward or backward pass of the Triton backend, given the tiling and the configurations.

Nothing here reads device memory: grids depend on shapes alone, so a pass neither waits for the device nor breaks a CUDA
graph. Inputs are contiguous and d is a multiple of 16 (see `backend`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from ablate.kernels.spec import TreeSpec, is_identity
from ablate.kernels.triton import gather, path_sum, pointwise, tiles, weight_grad
from ablate.kernels.triton.orders import Order, segments, sort_tokens, splits
from ablate.kernels.triton.tiling import Config, Piece, Tiling, grad_pieces

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One call: the shape, the tiling and the launches. Tensors are [N, d] tokens, [K, rows, d] weights, as in `op`."""

    spec: TreeSpec
    tokens: int
    d: int
    dtype: torch.dtype
    tiling: Tiling
    configs: Mapping[str, Config]
    tile_levels: int
    split_tokens: int
    where: torch.device

    def device(self) -> contextlib.AbstractContextManager[Any]:
        """Launch on the tensors' device, whichever is current."""
        return torch.cuda.device(self.where) if self.where.type == "cuda" else contextlib.nullcontext()

    def empty(self, *shape: int, like_input: bool = False) -> Tensor:
        """An allocation, fp32 or in the input's dtype; for the interpreter always fp32: it rounds to bf16 wrongly."""
        dtype = self.dtype if like_input and not INTERPRETED else torch.float32
        return torch.empty(shape, dtype=dtype, device=self.where)

    def respond(
        self,
        x: Tensor,
        w_in: Tensor,
        b: Tensor | None,
        thresholds: Tensor | None,
        leaves: Tensor | None,
        *,
        with_leaves: bool,
    ) -> tuple[Tensor, Tensor, Order | None]:
        """Leaves [N, K] and responses [N, K, D (+ W)]: down the tree stage by stage, tokens sorted again before each.

        Also the last order of the tokens, for passes over the same leaves.
        """
        spec, tiling, n = self.spec, self.tiling, self.tokens
        z = self.empty(n, spec.trees, spec.path if with_leaves else spec.depth)
        given = leaves is not None
        codes = (
            leaves.to(torch.int32, copy=True).contiguous()
            if leaves is not None
            else torch.zeros((n, spec.trees), dtype=torch.int32, device=self.where)
        )
        if n == 0:
            return codes, z, None
        b = None if b is None else b.contiguous()
        t = None if thresholds is None or given else thresholds.float().contiguous()
        order = sort_tokens(codes, spec.depth) if given and tiling.sorted else None
        for stage in tiling.stages:
            if tiling.sorted and not given and stage.level > 0:
                order = sort_tokens(codes, stage.level)
            self.dots(stage, x, codes, order, w_in, b, t, z, (0, spec.trees), routes=not given)
        if tiling.row_level < spec.depth or (with_leaves and tiling.leaves is None):
            self.row_dots(x, codes, order, w_in, b, t, z, (0, spec.trees), routes=not given, leaves=with_leaves)
        if with_leaves and tiling.leaves is not None:
            order = self.order(codes, order)
            self.dots(tiling.leaves, x, codes, order, w_in, b, None, z, (0, spec.trees), routes=False)
        return codes, z, order

    def output(self, z: Tensor, codes: Tensor, order: Order | None, w_out: Tensor) -> Tensor:
        """y [N, d] from the responses, up the trees in rising order."""
        spec = self.spec
        if self.tokens == 0:
            return self.empty(0, self.d, like_input=True)
        order = self.order(codes, order)
        if spec.placement != "unit":
            epilogue = "tree" if spec.placement == "tree" else "all"
            return self.spread(z, codes, order, w_out, (0, spec.trees), epilogue)
        h = torch.empty_like(z)
        self.pointwise("activate", z, h)
        return self.spread(h, codes, order, w_out, (0, spec.trees), "none")

    def gradients(
        self,
        gy: Tensor,
        x: Tensor,
        w_in: Tensor,
        b: Tensor | None,
        w_out: Tensor,
        codes: Tensor,
        z: Tensor,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """See `backward`. The sum of units inside phi (placements tree and sum) is computed again, not saved."""
        spec, trees = self.spec, (0, self.spec.trees)
        need_x, need_in, need_b, need_out = needs[0], needs[1], needs[2] and b is not None, needs[3]
        if self.tokens == 0:
            zeros = (torch.zeros_like(t) if t is not None else None for t in (x, w_in, b, w_out))
            wanted = (need_x, need_in, need_b, need_out)
            gx, gw, gb, go = (z if w else None for z, w in zip(zeros, wanted, strict=True))
            return gx, gw, gb, go
        by_leaf = (
            sort_tokens(codes, spec.depth) if any(p.tiles > 1 for p in grad_pieces(spec, self.tile_levels)) else None
        )
        order = by_leaf if self.tiling.sorted else None
        g_out = self.empty(*w_out.shape, like_input=True) if need_out else None
        dz = self.empty(self.tokens, spec.trees, spec.path)
        h = z
        if spec.placement == "unit":
            self.path_dots(gy, codes, order, w_out, dz, trees)
            h = torch.empty_like(z)
            self.pointwise("path_grad", z, h, dz)
            if g_out is not None:
                self.wgrad(h, gy, codes, by_leaf, g_out, None, trees)
        else:
            steps = [(k, k + 1) for k in range(spec.trees)] if spec.placement == "tree" else [trees]
            for step in steps:
                inner = self.spread(z, codes, order, w_out, step, "slope", g=gy)
                self.path_dots(inner, codes, order, w_out, dz, step)
                if g_out is not None:
                    self.wgrad(z, inner, codes, by_leaf, g_out, None, step)
        gx = self.spread(dz, codes, order, w_in, trees, "none").to(x.dtype) if need_x else None
        g_in = g_b = None
        if need_in or need_b:
            g_in = self.empty(*w_in.shape, like_input=True)
            g_b = self.empty(spec.trees, spec.in_rows, like_input=True) if need_b else None
            if not spec.node_output:
                g_in[:, : spec.nodes] = 0
                if g_b is not None:
                    g_b[:, : spec.nodes] = 0
            self.wgrad(dz, x, codes, by_leaf, g_in, g_b, trees)
        return (
            gx,
            g_in.to(w_in.dtype) if g_in is not None and need_in else None,
            g_b.to(b.dtype) if g_b is not None and b is not None else None,
            g_out.to(w_out.dtype) if g_out is not None else None,
        )

    def order(self, codes: Tensor, have: Order | None) -> Order | None:
        """The order all of the tiling's pieces need, by leaf; `have` where it will do."""
        if not self.tiling.sorted:
            return None
        if have is not None and have.levels >= self.tiling.sorted_levels:
            return have
        return sort_tokens(codes, self.spec.depth)

    def path_dots(
        self, g: Tensor, codes: Tensor, order: Order | None, w: Tensor, v: Tensor, trees: tuple[int, int]
    ) -> None:
        """v[n, k, u] = <g[n], w_out[k, u]> over the units of the path that have a row in w_out."""
        tiling = self.tiling
        for stage in tiling.stages if self.spec.node_output else ():
            self.dots(stage, g, codes, order, w, None, None, v, trees, routes=False)
        if (tiling.row_level < self.spec.depth and self.spec.node_output) or tiling.leaves is None:
            self.row_dots(
                g, codes, order, w, None, None, v, trees, routes=False, leaves=tiling.leaves is None, out=True
            )
        if tiling.leaves is not None:
            self.dots(tiling.leaves, g, codes, order, w, None, None, v, trees, routes=False)

    # ---- one launch each -------------------------------------------------------------------------------------------

    def leaf_base(self, w: Tensor) -> int:
        """Row of the first leaf unit in w_in or w_out."""
        return w.shape[1] - self.spec.leaves * self.spec.leaf_width

    def dots(
        self,
        piece: Piece,
        a: Tensor,
        codes: Tensor,
        order: Order | None,
        w: Tensor,
        b: Tensor | None,
        t: Tensor | None,
        v: Tensor,
        trees: tuple[int, int],
        *,
        routes: bool,
    ) -> None:
        """`tiles.tile_dots` for one piece; with `routes` codes move from the piece's level to the one below it."""
        c = self.configs["tile_dots" if piece.height else "leaf_dots"]
        tiles.tile_dots[(triton.cdiv(self.tokens, c.bt), trees[1] - trees[0], piece.chunks)](
            a, codes, codes if order is None else order.perm, w, w if b is None else b, v if t is None else t, v,
            self.tokens, self.spec.trees, trees[0], self.d, v.shape[2], w.shape[1], self.spec.nodes, self.leaf_base(w),
            piece.level, 0 if routes else piece.shift, piece.width, piece.group,
            HEIGHT=piece.height, LANES=piece.lanes, ROUTE=routes, SORTED=order is not None, BIAS=b is not None,
            THRESHOLDS=t is not None, EVEN=self.d % c.bd == 0, INTERPRETED=INTERPRETED, BT=c.bt, BD=c.bd,
            **c.options(),
        )  # fmt: skip

    def row_dots(
        self,
        a: Tensor,
        codes: Tensor,
        order: Order | None,
        w: Tensor,
        b: Tensor | None,
        t: Tensor | None,
        v: Tensor,
        trees: tuple[int, int],
        *,
        routes: bool,
        leaves: bool,
        out: bool = False,
    ) -> None:
        """`gather.row_dots` for the levels and leaves that the tiling leaves to rows."""
        c = self.configs["row_dots"]
        skip_nodes = out and not self.spec.node_output
        gather.row_dots[(triton.cdiv(self.tokens, c.bt), trees[1] - trees[0])](
            a, codes, codes if order is None else order.perm, w, w if b is None else b, v if t is None else t, v,
            self.tokens, self.spec.trees, trees[0], self.d, v.shape[2], w.shape[1], self.spec.nodes, self.leaf_base(w),
            self.spec.depth, self.spec.depth if skip_nodes else self.tiling.row_level, self.spec.leaf_width,
            ROUTE=routes, LEAVES=leaves and self.tiling.leaves is None, SORTED=order is not None, BIAS=b is not None,
            THRESHOLDS=t is not None, EVEN=self.d % c.bd == 0, BT=c.bt, BD=c.bd,
            **c.options(),
        )  # fmt: skip

    def spread(
        self,
        coef: Tensor,
        codes: Tensor,
        order: Order | None,
        w: Tensor,
        trees: tuple[int, int],
        epilogue: str,
        g: Tensor | None = None,
    ) -> Tensor:
        """`path_sum.spread` over the trees: one launch, or one a tree where tokens are in the order of its leaves."""
        spec, tiling = self.spec, self.tiling
        nodes = spec.node_output
        stages = tiling.stages if nodes else ()
        hs = [p.height for p in stages] + [0] * (3 - len(stages))
        lanes = [p.lanes for p in stages] + [16] * (3 - len(stages))
        leaves = tiling.leaves
        rows = nodes and tiling.row_level < spec.depth
        c = self.configs["spread" if stages or leaves else "spread_rows"]
        act, mirrored = self.act(leaf=True)
        out = self.empty(self.tokens, self.d, like_input=True)
        steps = [trees] if order is None else [(k, k + 1) for k in range(*trees)]
        total = self.empty(self.tokens, self.d) if len(steps) > 1 else out
        for i, (first, last) in enumerate(steps):
            path_sum.spread[(triton.cdiv(self.tokens, c.bt), triton.cdiv(self.d, c.bd))](
                coef, codes, codes if order is None else order.perm, w, total, coef if g is None else g, out,
                self.tokens, spec.trees, first, last, self.d, spec.path, w.shape[1], spec.depth, tiling.row_level,
                self.leaf_base(w), spec.leaf_width, 0 if leaves is None else leaves.group,
                float(spec.mirror), float(spec.leaf_gain),
                HEIGHT0=hs[0], HEIGHT1=hs[1], HEIGHT2=hs[2], LANES0=lanes[0], LANES1=lanes[1], LANES2=lanes[2],
                ROWS=rows, LEAF_LANES=0 if leaves is None else leaves.lanes, SORTED=order is not None,
                FIRST=i == 0, LAST=i == len(steps) - 1, EPILOGUE=epilogue, ACT=act, MIRRORED=mirrored,
                EVEN=self.d % c.bd == 0, INTERPRETED=INTERPRETED, BT=c.bt, BD=c.bd,
                **c.options(),
            )  # fmt: skip
        return out

    def wgrad(
        self,
        coef: Tensor,
        a: Tensor,
        codes: Tensor,
        order: Order | None,
        dw: Tensor,
        db: Tensor | None,
        trees: tuple[int, int],
    ) -> None:
        """`weight_grad.tile_wgrad`, and `weight_grad.fold` where segments are split, for every piece that has rows in dw.

        Nodes without an output have no gradient anywhere: their rows are the caller's to zero.
        """
        spec, k = self.spec, trees[1] - trees[0]
        c, cf = self.configs["tile_wgrad"], self.configs["fold"]
        for piece in grad_pieces(spec, self.tile_levels):
            if piece.height > 0 and not spec.node_output:
                continue
            seg_order = order if piece.tiles > 1 else None
            seg = segments(seg_order, piece, spec.depth, self.tokens, spec.trees, self.where)
            runs = splits(piece, self.tokens, self.d, k, c.bd, self.split_tokens)
            slots = piece.tiles * piece.chunks * piece.lanes
            part = self.empty(runs, spec.trees, slots, self.d) if runs > 1 else dw
            part_b = dw if db is None else (self.empty(runs, spec.trees, slots) if runs > 1 else db)
            blocks = triton.cdiv(self.d, c.bd)
            weight_grad.tile_wgrad[(piece.tiles * piece.chunks, blocks, k * runs)](
                coef, a, codes, codes if seg_order is None else seg_order.perm, seg, part, part_b,
                self.tokens, spec.trees, trees[0], self.d, spec.path, dw.shape[1], self.leaf_base(dw),
                piece.level, piece.shift, piece.width, piece.group, piece.tiles, piece.chunks, runs,
                HEIGHT=piece.height, LANES=piece.lanes, SORTED=seg_order is not None, BIAS=db is not None,
                PARTIAL=runs > 1, EVEN=self.d % c.bd == 0, INTERPRETED=INTERPRETED, BT=c.bt, BD=c.bd,
                **c.options(),
            )  # fmt: skip
            if runs > 1:
                weight_grad.fold[(piece.tiles * piece.chunks, triton.cdiv(self.d, cf.bd), k)](
                    part, part_b, dw, dw if db is None else db,
                    spec.trees, trees[0], self.d, dw.shape[1], self.leaf_base(dw), piece.level, piece.width,
                    piece.group, piece.tiles, piece.chunks, runs,
                    HEIGHT=piece.height, LANES=piece.lanes, BIAS=db is not None, BD=cf.bd,
                    **cf.options(),
                )  # fmt: skip

    def act(self, *, leaf: bool) -> tuple[str, bool]:
        """The kernels' ACT and MIRRORED for leaf units (and for summed outputs) or for node units."""
        mirror = self.spec.mirror if leaf else self.spec.node_mirror
        return (
            ("identity", False) if is_identity(self.spec.activation, mirror) else (self.spec.activation, mirror != 0.0)
        )

    def pointwise(self, kernel: str, z: Tensor, h: Tensor, dh: Tensor | None = None) -> None:
        """`pointwise.activate` (h from z), or with dh `pointwise.path_grad` (h from z, and dh becomes dz)."""
        spec, c = self.spec, self.configs[kernel]
        node_act, node_mirrored = self.act(leaf=False)
        leaf_act, leaf_mirrored = self.act(leaf=True)
        scalars = (
            z.numel(), spec.path, spec.depth,
            float(spec.node_mirror), float(spec.node_gain), float(spec.mirror), float(spec.leaf_gain),
        )  # fmt: skip
        options = {
            "NODE_ACT": node_act, "NODE_MIRRORED": node_mirrored, "LEAF_ACT": leaf_act, "LEAF_MIRRORED": leaf_mirrored,
            "BLOCK": c.bt, **c.options(),
        }  # fmt: skip
        grid = (triton.cdiv(z.numel(), c.bt),)
        if dh is None:
            pointwise.activate[grid](z, h, *scalars, **options)
        else:
            pointwise.path_grad[grid](z, dh, h, *scalars, NODES=spec.node_output, **options)
