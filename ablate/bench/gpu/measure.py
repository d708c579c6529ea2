"""What the lane measures of one layer: correctness, repeats, rates of the machine, contenders, predictions, decoding."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablate.bench.contenders import CONTENDERS, SHAPES, Contender, Shape, assert_correct, build, tokens
from ablate.bench.gpu.lane import Rows, Setup
from ablate.bench.timing import calls_of, in_turn, on_gpu
from ablate.kernels.op import tree_feedforward
from ablate.kernels.spec import TreeSpec
from ablate.kernels.triton import backend as triton
from ablate.kernels.triton import predict
from ablate.kernels.triton.tiling import STRATEGIES

BALANCE = (0.45, 0.95)
"""Effective leaves over L of the two batches: what trained trees have, and what balanced ones have."""
TINY = Shape(name="tiny", tokens=16, d=16, trees=1, depth=2, leaf_width=2)
ROOT = Path(__file__).parents[3]
"""The folder of the checkout, which has the tests."""


def shapes(setup: Setup) -> list[Shape]:
    """Return the shapes of `ablate bench layer`, or a tiny one in a dry run."""
    return [TINY] if setup.dry else list(SHAPES.values())


def dtype_of(setup: Setup) -> torch.dtype:
    """Return bfloat16 on a GPU; the interpreter computes wrongly in it, so float32 in a dry run."""
    return torch.float32 if setup.dry else torch.bfloat16


def seconds_of(setup: Setup, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each call."""
    timed = {name: (call, 1.0) for name, call in calls.items()}
    times = in_turn(timed, runs=1) if setup.dry else on_gpu(timed, warmup=20, rep=100)
    return {name: statistics.median(each) for name, each in times.items()}


def machine(setup: Setup) -> Rows:
    """Measure what the machine reaches: bytes a second of a copy, flops a second of square products."""
    n = 1 << (16 if setup.dry else 28)
    size = 64 if setup.dry else 8192
    source, target = (torch.empty(n, dtype=torch.uint8, device=setup.device) for _ in range(2))
    rows: Rows = []
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    dtypes = [torch.float32] if setup.dry else [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=setup.device, dtype=dtype) for _ in range(2))
        calls[f"product {_name(dtype)}"] = lambda a=a, b=b: a @ b  # type: ignore[misc]
    for name, seconds in seconds_of(setup, calls).items():
        rate, unit = (2 * n / seconds / 1e9, "GB/s") if name == "copy" else (2 * size**3 / seconds / 1e12, "TFLOP/s")
        rows.append({"what": name, "seconds": seconds, "rate": rate, "unit": unit})
    return rows


def correctness(setup: Setup) -> Rows:
    """Compare every strategy with the reference: outputs, leaves, all gradients; raise AssertionError on a difference."""
    rows: Rows = []
    for shape, dtype, strategy in itertools.product(
        shapes(setup), [torch.float32] if setup.dry else [torch.float32, torch.bfloat16], STRATEGIES
    ):
        tree = build(shape, setup.device, dtype, ["tree"], backend="triton")
        for balance in BALANCE:
            x, reached = balanced(shape, tree["tree"], balance, setup, dtype)
            with triton.using(strategy=strategy, always_tile=setup.dry):
                row = {"shape": shape.name, "dtype": _name(dtype), "strategy": strategy, "n_eff_frac": reached}
                try:
                    assert_correct(shape, tree, x, backend="triton")
                    rows.append(row | {"right": True, "why": ""})
                except AssertionError as error:
                    rows.append(row | {"right": False, "why": str(error)})
    return rows


def repeats(setup: Setup) -> Rows:
    """Run each strategy five times on one batch and compare all results bit for bit; then once from a captured graph."""
    rows: Rows = []
    for shape, strategy in itertools.product(shapes(setup), STRATEGIES):
        tree = build(shape, setup.device, dtype_of(setup), ["tree"], backend="triton")["tree"]
        x, _ = balanced(shape, tree, BALANCE[0], setup, dtype_of(setup))
        with triton.using(strategy=strategy, always_tile=setup.dry):
            first = _results(tree, x, shape.spec)
            same = all(
                all(torch.equal(a, b) for a, b in zip(first, _results(tree, x, shape.spec), strict=True))
                for _ in range(1 if setup.dry else 5)
            )
            graph = None if setup.dry else _captured(tree, x, shape.spec)
        rows.append({"shape": shape.name, "strategy": strategy, "bitwise_equal": same, "graph_equal": graph})
    return rows


def contenders(setup: Setup) -> Rows:
    """Time the tree beside dense layers, UltraFastBERT's and mixtures of experts, both passes, at two balances.

    Rows say which fraction of the measured copy rate and product rate each reaches, counting useful work only.
    """
    rates = {row["what"]: row["rate"] for row in machine(setup)}
    dtype = dtype_of(setup)
    names = [n for n in CONTENDERS if n != "fastfeedforward" and not (setup.dry and n.endswith("_compiled"))]
    rows: Rows = []
    for shape in shapes(setup):
        built = build(shape, setup.device, dtype, names, backend="triton")
        for balance, pass_ in itertools.product(BALANCE, ("forward", "forward_backward")):
            x, reached = balanced(shape, built["tree"], balance, setup, dtype)
            took: dict[str, float] = {}
            for name, call in calls_of(built, x, pass_).items():
                row: dict[str, Any] = {"shape": shape.name, "pass": pass_, "n_eff_frac": reached, "contender": name}
                try:
                    took[name] = seconds_of(setup, {name: call[0]})[name]
                # One contender may lack something here (a compiler, a device too old): the others are still measured.
                except Exception as error:
                    rows.append(row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
                    continue
                backward = pass_ != "forward"
                moved = built[name].moved(shape, dtype.itemsize, backward=backward)
                flops = shape.flops(built[name].units, backward=backward)
                rows.append(
                    row
                    | {
                        "seconds": took[name],
                        "times_tree": took[name] / took["tree"],
                        "of_copy": moved / took[name] / 1e9 / rates["copy"],
                        "of_product": flops / took[name] / 1e12 / rates[f"product {_name(dtype)}"],
                    }
                )
    return rows


def predictions(setup: Setup) -> Rows:
    """Time every strategy and put the prediction of docs/kernels.md beside it, forward and backward."""
    rows: Rows = []
    dtype = dtype_of(setup)
    for shape, strategy in itertools.product(shapes(setup), STRATEGIES):
        tree = build(shape, setup.device, dtype, ["tree"], backend="triton")
        x, reached = balanced(shape, tree["tree"], BALANCE[1], setup, dtype)
        n, d, kind = shape.tokens, triton.padded_width(shape.d), triton.DTYPES[dtype]
        ahead = predict.seconds(predict.forward_steps(shape.spec, n, d, kind, strategy), kind)
        back = predict.seconds(predict.backward_steps(shape.spec, n, d, kind, strategy), kind)
        for pass_, expected in (("forward", ahead), ("forward_backward", ahead + back)):
            with triton.using(strategy=strategy, always_tile=setup.dry):
                took = seconds_of(setup, {"tree": calls_of(tree, x, pass_)["tree"][0]})["tree"]
            rows.append(
                {
                    "shape": shape.name,
                    "strategy": strategy,
                    "pass": pass_,
                    "n_eff_frac": reached,
                    "seconds": took,
                    "predicted": expected,
                    "measured_over_predicted": took / expected,
                    "chosen": strategy == predict.fastest(shape.spec, n, d, kind),
                }
            )
    return rows


def decoding(setup: Setup) -> Rows:
    """Time one layer on 1 and 8 tokens, as generation calls it, launched one by one and from a captured graph."""
    rows: Rows = []
    dtype = dtype_of(setup)
    for shape, n in itertools.product(shapes(setup), (1, 8)):
        built = build(shape, setup.device, dtype, ["dense_total", "dense_4d", "dense_active"], backend="triton")
        x = tokens(shape, "iid", setup.device, dtype)[:n]
        calls = {name: timed[0] for name, timed in calls_of(built, x, "forward").items()}
        plain = seconds_of(setup, calls)
        replayed = {} if setup.dry else seconds_of(setup, {name: _replay(call) for name, call in calls.items()})
        rows += [
            {
                "shape": shape.name,
                "tokens": n,
                "contender": name,
                "seconds": plain[name],
                "graph_seconds": replayed.get(name),
                "times_tree": plain[name] / plain["tree"],
            }
            for name in calls
        ]
    return rows


def gpu_tests(setup: Setup) -> Rows:
    """Run `pytest -m gpu` where pytest and hypothesis are installed, and say so where they are not."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or not (ROOT / "tests" / "gpu").is_dir():
        return [{"outcome": "not run", "why": f"{', '.join(missing) or 'tests/gpu'} is not here"}]
    # A dry run only collects them: each skips without a GPU.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, *(["--collect-only"] if setup.dry else [])],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    failed = [line for line in lines if re.match(r"(FAILED|ERROR)\b", line)]
    return [{"outcome": lines[-1].strip("= "), "exit_code": done.returncode, "why": "\n".join(failed[:20])}]


def balanced(shape: Shape, tree: Contender, share: float, setup: Setup, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return x [N, d] on which the tree has about `share` of its leaves in effective use, and the share it has.

    A common mean tips every node to one side; bisection finds its size. A batch of few tokens a leaf cannot reach a
    share near 1: then the mean is 0.
    """
    g = torch.Generator().manual_seed(1)
    noise, mean = torch.randn(shape.tokens, shape.d, generator=g), torch.randn(shape.d, generator=g)
    w_in, b, _ = tree.parameters

    def at(size: float) -> tuple[Tensor, float]:
        x = (noise + size * mean).to(setup.device, dtype)
        with torch.no_grad():
            leaves = triton.route(x, w_in, b, None, shape.spec)[0]
        return x, effective(leaves, shape.spec.leaves)

    low, high = 0.0, 4.0
    best = at(low)
    if best[1] <= share:
        return best
    for _ in range(10):
        middle = (low + high) / 2
        best = at(middle)
        low, high = (middle, high) if best[1] > share else (low, middle)
    return best


def effective(leaves: Tensor, count: int) -> float:
    """Return exp(entropy of leaf usage) over the number of leaves, the mean over trees, of leaves [N, K]."""
    shares = torch.stack([torch.bincount(column, minlength=count) for column in leaves.long().T]).double() / len(leaves)
    return float(torch.special.entr(shares).sum(1).exp().mean() / count)


def _results(tree: Contender, x: Tensor, spec: TreeSpec) -> list[Tensor]:
    w_in, b, w_out = tree.parameters
    x = x.detach().requires_grad_()
    out = tree_feedforward(x, w_in, b, w_out, spec, backend="triton")
    grads = torch.autograd.grad(out.y, (x, w_in, b, w_out), torch.ones_like(out.y))
    return [out.y.detach(), out.leaves, *grads]


def _captured(tree: Contender, x: Tensor, spec: TreeSpec) -> bool:
    """Whether a captured forward pass, replayed on other tokens, equals a plain one on those tokens."""
    w_in, b, w_out = tree.parameters
    x = x.clone()
    with torch.no_grad():
        tree_feedforward(x, w_in, b, w_out, spec, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = tree_feedforward(x, w_in, b, w_out, spec, backend="triton")
        x.copy_(x.flip(0))
        graph.replay()
        want = tree_feedforward(x, w_in, b, w_out, spec, backend="triton")
    return torch.equal(out.y, want.y) and torch.equal(out.leaves, want.leaves)


def _replay(call: Callable[[], object]) -> Callable[[], object]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
