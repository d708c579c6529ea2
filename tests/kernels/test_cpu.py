"""The CPU backend: the shared contract at one and two threads, and what is its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ablate.kernels import activations
from ablate.kernels.cpu import pointwise as cpu_pointwise
from ablate.kernels.cpu.jit import jit
from ablate.kernels.cpu.threads import run_on_threads
from ablate.kernels.spec import ACTIVATIONS, TRAITS, Activation, Placement
from tests.kernels.contract import BackendContract, Case, Layer, check, random_cases, tree

DTYPES = (torch.float32, torch.float64)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(restore_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def two_threads(restore_threads: None) -> None:
    torch.set_num_threads(2)


@pytest.mark.usefixtures("one_thread")
class TestOneThread(BackendContract):
    backend = "cpu"
    dtypes = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.usefixtures("two_threads")
class TestTwoThreads(BackendContract):
    backend = "cpu"
    dtypes = DTYPES


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(case=random_cases(tokens=300, d=80))
def test_random_shapes(case: Case) -> None:
    check(case, "cpu", DTYPES[case.seed % 2])


BIG = Case(why="several tasks", tokens=1500, d=40, spec=tree(trees=3, depth=4, leaf_width=3), thresholds=True)


# Rows of 4 KiB: a block's x is parted in pieces of 64 tokens near the root, and then by the node they reached.
WIDE = Case(why="pieces near the root", tokens=700, d=1025, spec=tree(trees=1, depth=5, leaf_width=1), thresholds=True)


@pytest.mark.parametrize(
    "case",
    [
        BIG,
        replace(BIG, hot=True),
        replace(BIG, spec=tree(trees=1, depth=7, leaf_width=1)),
        WIDE,
        replace(WIDE, hot=True),
    ],
)
def test_several_tasks_a_thread_agree_with_the_reference(case: Case, two_threads: None) -> None:
    check(case, "cpu", torch.float32)


@pytest.mark.parametrize("placement", ["unit", "tree"])
def test_bits_do_not_depend_on_threads_or_tasks(placement: Placement, restore_threads: None) -> None:
    layer = Layer.of(replace(BIG, spec=replace(BIG.spec, placement=placement)), torch.float32, "cpu")
    torch.set_num_threads(1)
    alone, alone_grads = layer.call("cpu")
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        out, grads = layer.call("cpu")
        assert torch.equal(out.y, alone.y)
        assert torch.equal(out.responses, alone.responses)
        assert torch.equal(out.leaves, alone.leaves)
        for name, grad in grads.items():
            assert torch.equal(grad, alone_grads[name]), name


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    layer = Layer.of(BIG, torch.float32, "cpu")
    together, _ = layer.call("cpu")
    for first, last in ((0, 1), (700, 713), (1499, 1500)):
        part, _ = replace(layer, x=layer.x[first:last], gy=layer.gy[first:last]).call("cpu")
        assert torch.equal(part.y, together.y[first:last])
        assert torch.equal(part.leaves, together.leaves[first:last])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("activation", "mirror"),
    [(a, mirror) for a in ACTIVATIONS for mirror in ([0.0] if TRAITS[a].odd else [0.0, -1.0, 1.0, 0.4])],
)
def test_pointwise_functions(activation: Activation, mirror: float, dtype: type[np.floating]) -> None:
    """Against the definition in float64, over the whole range, zero and far tails included."""
    z = np.concatenate([np.linspace(-9, 9, 4001), [0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0]]).astype(dtype)
    exact = torch.from_numpy(z).double()
    tolerance = 2e-6 if dtype is np.float32 else 1e-13
    for ours, definition in ((cpu_pointwise.phi, activations.phi), (cpu_pointwise.slope, activations.phi_slope)):
        got = np.empty_like(z)
        ours(z, len(z), np.array(cpu_pointwise.code(activation, mirror, 1.3)), got)
        want = definition(exact, activation, mirror, 1.3).numpy()
        assert np.all(np.abs(got - want) <= tolerance * (1 + np.abs(want)))


def test_an_unknown_activation_is_refused_and_an_unknown_code_is_no_number() -> None:
    with pytest.raises(ValueError, match="'swish' is not one of gelu"):
        cpu_pointwise.code("swish", 0.0, 1.0)  # type: ignore[arg-type]
    for function in (cpu_pointwise.phi, cpu_pointwise.slope):
        out = np.zeros(3, np.float32)
        function(np.ones(3, np.float32), 2, np.array([99.0, 0.0, 1.0]), out)
        assert np.isnan(out).tolist() == [True, True, False]


def test_work_runs_on_torchs_own_threads(two_threads: None) -> None:
    """No second pool: any number of parallel regions of ours, between torch's, starts no further thread."""
    a = torch.randn(600, 600)
    layer = Layer.of(replace(BIG, tokens=600), torch.float32, "cpu")
    a @ a
    layer.call("cpu")
    before = len(os.listdir("/proc/self/task"))
    for _ in range(5):
        a @ a
        layer.call("cpu")
    assert len(os.listdir("/proc/self/task")) == before
    seen: set[int] = set()
    gate = threading.Barrier(2, timeout=60)

    def work() -> None:
        seen.add(threading.get_native_id())
        gate.wait()

    run_on_threads(work, 2)
    first = set(seen)
    run_on_threads(work, 2)
    assert len(first) == 2
    assert seen == first


@pytest.mark.skipif("PYTEST_XDIST_WORKER_COUNT" not in os.environ, reason="one process has all cores")
def test_workers_of_pytest_share_the_cores_out() -> None:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    assert workers * int(os.environ["OMP_NUM_THREADS"]) <= max(workers, os.cpu_count() or 1)


def test_an_error_in_a_thread_reaches_the_caller(two_threads: None) -> None:
    def fail() -> None:
        raise RuntimeError("from a thread")

    with pytest.raises(RuntimeError, match="from a thread"):
        run_on_threads(fail, 2)


def test_kernels_compile_where_nothing_can_be_cached() -> None:
    """Numba refuses to cache a function without a file, as it does where no folder can be written."""
    space: dict[str, Any] = {}
    exec("def add(x):\n    return x + 1", space)
    assert jit(space["add"])(1) == 2


def test_a_changed_kernel_file_never_meets_old_code_of_another(tmp_path: Path) -> None:
    """Numba keeps what was compiled into a function for as long as that function's own file is the same."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "outer.py").write_text(
        "from inner import inner\nfrom ablate.kernels.cpu import jit as home\nhome.SOURCES = (home.Path(__file__).parent,)\n"
        "@home.jit\ndef outer(x):\n    return inner(x) + 1\nprint(outer(1))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for factor in (10, 20):
        (folder / "inner.py").write_text(f"import numba\n@numba.njit\ndef inner(x):\n    return {factor} * x\n")
        done = subprocess.run(
            [sys.executable, "outer.py"], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) == factor + 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.soak
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    """Both write the same cache, and both results are right."""
    code = (
        "import torch\nfrom ablate.kernels.op import tree_feedforward\nfrom ablate.kernels.spec import TreeSpec\n"
        "s = TreeSpec(trees=2, depth=3, leaf_width=2)\ng = torch.Generator().manual_seed(0)\n"
        "x, w, v = (torch.randn(*t, generator=g) for t in ((50, 16), (2, 23, 16), (2, 23, 16)))\n"
        "a, b = (tree_feedforward(x, w, None, v, s, backend=n).y for n in ('cpu', 'reference'))\n"
        "assert torch.allclose(a, b, atol=1e-4)\n"
    )
    fresh = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    both = [subprocess.Popen([sys.executable, "-c", code], env=fresh) for _ in range(2)]
    assert [p.wait(300) for p in both] == [0, 0]
    assert any((tmp_path / "cache").rglob("*.nbi"))
