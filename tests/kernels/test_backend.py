"""The registry of backends: each module has what the protocol asks for, and names are checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given

from ablate.kernels.backend import BACKENDS, Backend, RaggedBackend, choose, has_ragged, load, load_ragged
from ablate.kernels.cpu import backend as cpu
from ablate.kernels.ragged import cpu as ragged_cpu
from ablate.kernels.spec import parse_spec
from ablate.kernels.triton import backend as triton
from tests.kernels.contract import Case, random_cases

# The type checker compares these modules with the protocols, argument by argument.
MODULES: dict[str, Backend] = {"cpu": cpu, "triton": triton}
RAGGED: dict[str, RaggedBackend] = {"cpu": ragged_cpu}


def test_every_entry_names_a_checked_module() -> None:
    assert {name: load(name) for name in BACKENDS} == MODULES
    assert {name: load_ragged(name) for name in BACKENDS if BACKENDS[name].ragged} == RAGGED
    assert not has_ragged("triton")
    assert not has_ragged("reference")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "chosen"),
    [
        ("auto", "cpu", torch.float64, "cpu"),
        ("auto", "cpu", torch.float16, "cpu"),
        ("auto", "cuda", torch.float16, "triton"),
        ("auto", "cuda", torch.bfloat16, "triton"),
        ("auto", "cuda", torch.float64, "reference"),
        ("auto", "mps", torch.float32, "reference"),
        ("reference", "cpu", torch.float32, "reference"),
        ("cpu", "cuda", torch.float32, "cpu"),
    ],
)
def test_auto_goes_by_device_and_dtype(backend: str, device: str, dtype: torch.dtype, chosen: str) -> None:
    assert choose(backend, torch.device(device), dtype) == chosen


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend is 'gpu': auto, reference, cpu, triton are allowed"):
        choose("gpu", torch.device("cpu"), torch.float32)


@given(case=random_cases())
def test_a_spec_is_its_key(case: Case) -> None:
    spec = case.spec
    assert parse_spec(spec.key) == spec
    assert dataclasses.replace(spec, mirror=0.25).key != spec.key
