from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablate.kernels.ragged.op import forward_operator
from ablate.kernels.ragged.shape import shape_of
from ablate.model.ragged import RaggedFeedForward, keep, replace_layer, shape_like
from ablate.model.tree import TreeFeedForward

BACKENDS: tuple[str, ...] = ("cpu", "reference")
KINDS: list[dict[str, Any]] = [
    {},
    {"placement": "tree", "mirror": 0.5},
    {"placement": "sum", "activation": "silu"},
    {"node_output": False},
    {"node_mirror": 1.0, "gain": "unit", "bias": False},
    {"router": "frozen"},
    {"router": "frozen", "node_output": False, "routing": "centred"},
    {"routing": "centred", "router_input": "centred"},
]


def layer(d: int = 19, seed: int = 0, backend: str = "cpu", **kind: Any) -> TreeFeedForward:
    generator = torch.Generator().manual_seed(seed)
    shape = {"trees": 3, "depth": 4, "leaf_width": 3} | kind
    tree = TreeFeedForward(d, **shape, backend=backend, generator=generator)
    tree.thresholds.normal_(0, 0.1, generator=generator)
    tree.input_mean.normal_(0, 0.1, generator=generator)
    return tree.eval()


def inputs(tokens: int = 300, d: int = 19, seed: int = 1) -> torch.Tensor:
    # A common mean, as layer-normed streams have: it leaves some leaves empty.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, d, generator=generator) + 2 * torch.randn(d, generator=generator)


def taken(tree: TreeFeedForward, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        tree(x)
    assert tree.last_leaves is not None
    living = np.zeros((tree.spec.trees, tree.spec.leaves), dtype=bool)
    living[np.arange(tree.spec.trees), tree.last_leaves.numpy()] = True
    return living


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_keeping_what_tokens_reached_changes_no_bit(kind: dict[str, Any]) -> None:
    tree, x = layer(**kind), inputs()
    living = taken(tree, x)
    assert not living.all()
    ragged = keep(tree, living)
    assert ragged.total_units < tree.tree.total_units
    with torch.no_grad():
        assert torch.equal(ragged(x), keep(tree, np.ones_like(living))(x))
        torch.testing.assert_close(ragged(x), tree(x), rtol=0, atol=1e-5)
    assert ragged.last_leaves is not None
    assert tree.last_leaves is not None
    offsets = torch.arange(3) * tree.spec.leaves
    assert torch.equal(ragged.origin[ragged.last_leaves.long()], tree.last_leaves.long() + offsets)
    ragged.backend = "reference"
    torch.testing.assert_close(ragged(x), tree(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 9, 5000])
def test_a_layer_kept_whole_is_the_layer(tokens: int) -> None:
    tree, x = layer(depth=6, leaf_width=5), inputs(tokens)
    ragged = keep(tree, np.ones((3, 64), dtype=bool))
    assert ragged.total_units == tree.tree.total_units
    with torch.no_grad():
        torch.testing.assert_close(ragged(x), tree(x), rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    depth=st.integers(0, 4),
    width=st.integers(1, 5),
    d=st.integers(1, 21),
    tokens=st.sampled_from([0, 1, 5, 70]),
    seed=st.integers(0, 1000),
)
def test_both_backends_agree_on_outputs_and_gradients(
    kind: dict[str, Any], depth: int, width: int, d: int, tokens: int, seed: int
) -> None:
    tree = layer(d, seed, depth=depth, leaf_width=width, **kind).double()
    living = np.random.default_rng(seed).random((3, tree.spec.leaves)) < 0.5
    living[:, -1] |= ~living.any(1)
    results = []
    for backend in BACKENDS:
        ragged = keep(tree, living)
        ragged.backend = backend
        x = inputs(tokens, d, seed).double().requires_grad_()
        y = ragged(x)
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        wanted = [t for t in (x, ragged.w_in, ragged.b, ragged.w_out) if t is not None]
        results.append(
            [y, ragged.last_leaves, ragged.last_responses, *torch.autograd.grad(y, wanted, gy, allow_unused=True)]
        )
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_gradients_are_derivatives() -> None:
    tree = layer(3, trees=2, depth=3, leaf_width=2, placement="sum", mirror=0.3).double()
    living = np.ones((2, 8), dtype=bool)
    living[0, 1:5] = False
    for backend in BACKENDS:
        ragged = keep(tree, living)
        ragged.backend = backend
        x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        names = [name for name, _ in ragged.named_parameters()]

        def run(x: torch.Tensor, *weights: torch.Tensor, ragged: Any = ragged, names: Any = names) -> torch.Tensor:
            out: torch.Tensor = torch.func.functional_call(ragged, dict(zip(names, weights, strict=True)), (x,))
            return out

        assert torch.autograd.gradcheck(run, (x, *ragged.parameters()))


def test_always_taken_nodes_keep_their_output_and_decide_nothing() -> None:
    tree, x = layer(trees=1, depth=2, leaf_width=1, backend="reference"), inputs(50)
    ragged = keep(tree, np.array([[False, True, False, False]]))
    assert ragged.branches.tolist() == [[1, 1], [-1, -1]]
    assert tree.b is not None
    rows = [0, 1, 3 + 1]
    z = x @ tree.w_in[0, rows].T + tree.b[0, rows]
    torch.testing.assert_close(ragged(x), torch.nn.functional.gelu(z) @ tree.w_out[0, rows])

    routed = keep(layer(trees=1, depth=2, leaf_width=1, node_output=False), np.array([[False, True, False, True]]))
    assert routed.branches.tolist() == [[-1, -2]]
    assert routed.total_units == 1 + 2


def test_tokens_of_removed_paths_go_to_the_side_that_is_left() -> None:
    tree, x = layer(trees=1), inputs(2000)
    living = taken(tree, x)
    fullest = int(np.bincount(tree.last_leaves[:, 0].numpy()).argmax())  # type: ignore[index]
    living[0, fullest] = False
    ragged = keep(tree, living)
    ragged(x)
    assert ragged.last_leaves is not None
    before = tree.last_leaves[:, 0] == fullest  # type: ignore[index]
    now = ragged.origin[ragged.last_leaves[:, 0].long()]
    assert torch.equal(now[~before], tree.last_leaves[~before, 0].long())  # type: ignore[index]
    size = 1
    while not living[0, fullest // size * size : (fullest // size + 1) * size].any():
        size *= 2
    assert (now[before] // size == fullest // size).all()


def test_a_ragged_layer_learns() -> None:
    tree, x = layer(), inputs()
    ragged = keep(tree, taken(tree, x))
    target = torch.randn(300, 19, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(ragged.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = (ragged(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_repeats_and_thread_counts_give_the_same_bits() -> None:
    tree, x = layer(depth=6), inputs(3000)
    ragged = keep(tree, taken(tree, x))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        y = ragged(x)
        results.append([y, *torch.autograd.grad(y, list(ragged.parameters()), torch.ones_like(y))])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_operator_is_one_that_torch_understands() -> None:
    tree, x = layer(), inputs(20).requires_grad_()
    ragged = keep(tree, taken(tree, x))
    args = (x, ragged.w_in, ragged.b, ragged.w_out, ragged.thresholds, None, list(ragged.shape), "cpu", ragged.spec.key)
    torch.library.opcheck(
        forward_operator, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ragged(x).dtype == torch.bfloat16


def test_a_state_dict_makes_a_complete_model_ragged() -> None:
    def model() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Linear(19, 19), torch.nn.Sequential(layer(router="frozen")))

    trained, x = model(), inputs()
    inner = trained[1][0]  # type: ignore[index]
    replace_layer(trained, "1.0", keep(inner, taken(inner, trained[0](x))))
    fresh = model()
    shape_like(fresh, trained.state_dict())
    fresh.load_state_dict(trained.state_dict())
    assert isinstance(fresh.get_submodule("1.0"), RaggedFeedForward)
    with torch.no_grad():
        assert torch.equal(fresh(x), trained(x))


@pytest.mark.parametrize(
    ("roots", "branches", "message"),
    [
        ([0], [[-2, -1]], "leaf 1 where 0"),
        ([0], [[0, -1]], "node 0"),
        ([0], [[1, -1]], "node 1"),
        ([-1], [[-1, -2]], "belongs to no tree"),
        ([0], [[1, 1], [2, 2], [-1, -1]], "below 2 nodes"),
    ],
)
def test_tables_that_are_no_trees_are_refused(roots: list[int], branches: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_of(roots, np.array(branches), 2)


def test_a_mask_without_a_leaf_in_some_tree_is_refused() -> None:
    living = np.ones((3, 16), dtype=bool)
    living[1] = False
    with pytest.raises(ValueError, match="a leaf in each tree"):
        keep(layer(), living)
