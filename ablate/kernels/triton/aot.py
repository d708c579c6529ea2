"""Ahead-of-time compilation of every shipped kernel configuration, without a GPU, a driver or torch.

`python -m ablate.kernels.triton.aot [--json] [--target sm_90 ...]` prints what each needs of the device. Kernels are
compiled by processes of their own (the interpreter and the compiler cannot share one) into an empty cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ablate.kernels.triton.tiling import Config, DType, configs

# Backend, architecture and threads of a warp; the shared memory one program may use, bytes.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
_MODULES = {
    "tile_dots": "tiles",
    "leaf_dots": "tiles",
    "row_dots": "gather",
    "spread": "path_sum",
    "spread_rows": "path_sum",
    "tile_wgrad": "weight_grad",
    "fold": "weight_grad",
    "activate": "pointwise",
    "path_grad": "pointwise",
}
_FUNCTIONS = {"leaf_dots": "tile_dots", "spread_rows": "spread"}  # where a configuration's name is not the function's
_FP32 = {"v_ptr", "t_ptr", "c_ptr", "z_ptr", "h_ptr", "dh_ptr", "sum_ptr", "part_ptr", "part_b_ptr"}
_INT32 = {"code_ptr", "leaf_ptr", "perm_ptr", "seg_ptr"}
_FLOAT = {"mirror", "gain", "node_mirror", "node_gain", "leaf_mirror", "leaf_gain"}
_WORST_ACT = {"NODE_ACT": "gelu_tanh", "NODE_MIRRORED": True, "LEAF_ACT": "gelu", "LEAF_MIRRORED": True}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel, with its compile-time switches, to compile for one dtype, configuration and target."""

    kernel: str
    variant: str
    dtype: DType
    config: Config
    target: str
    switches: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What a compiled kernel needs: `spills` is bytes of stack (NVIDIA) or registers spilled (AMD)."""

    kernel: str
    variant: str
    config: Config
    dtype: DType
    target: str
    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: int
    tf32_instructions: int

    @property
    def fits(self) -> bool:
        """No spills, and within the target's shared memory."""
        return self.spills == 0 and self.shared_bytes <= SHARED_LIMIT[self.target]


def _variants(kernel: str, wide: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of the compile-time switches: the most demanding, and with `wide` every tile width and a ragged d."""
    either = (True, False) if wide else (True,)
    for even in either:
        mark = "" if even else " ragged"
        match kernel:
            case "tile_dots":
                common = {"SORTED": True, "BIAS": True, "EVEN": even, "INTERPRETED": False}
                for height in (6, 5, 4) if wide else (6,):
                    route = {"HEIGHT": height, "LANES": max(16, 1 << height), "ROUTE": True, "THRESHOLDS": True}
                    yield f"route {height} levels{mark}", common | route
            case "leaf_dots":
                common = {"SORTED": True, "BIAS": True, "EVEN": even, "INTERPRETED": False}
                for lanes in (64, 32, 16) if wide else (64,):
                    leaves = {"HEIGHT": 0, "LANES": lanes, "ROUTE": False, "THRESHOLDS": False}
                    yield f"leaves {lanes} wide{mark}", common | leaves
            case "row_dots":
                yield (
                    f"route{mark}",
                    {"ROUTE": True, "LEAVES": True, "SORTED": True, "BIAS": True, "THRESHOLDS": True, "EVEN": even},
                )
            case "spread" | "spread_rows":
                for epilogue, act in (("tree", "gelu"), ("slope", "gelu_tanh")) if wide else (("slope", "gelu_tanh"),):
                    tiles = kernel == "spread"
                    heights = {"HEIGHT0": 6, "HEIGHT1": 5, "HEIGHT2": 4, "LEAF_LANES": 64}
                    yield (
                        f"{epilogue}{mark}",
                        {name: value * tiles for name, value in heights.items()}
                        | {"LANES0": 64, "LANES1": 32, "LANES2": 16, "ROWS": True, "SORTED": True, "FIRST": False}
                        | {"LAST": True, "EPILOGUE": epilogue, "ACT": act, "MIRRORED": True}
                        | {"EVEN": even, "INTERPRETED": False},
                    )
            case "tile_wgrad":
                common = {"SORTED": True, "BIAS": True, "PARTIAL": False, "EVEN": even, "INTERPRETED": False}
                for height, lanes in ((6, 64), (5, 32), (4, 16), (0, 64)) if wide else ((6, 64),):
                    name = f"subtrees of {height} levels" if height else "leaves"
                    yield f"{name}{mark}", common | {"HEIGHT": height, "LANES": lanes}
                if wide:
                    yield f"partial{mark}", common | {"HEIGHT": 6, "LANES": 64, "PARTIAL": True}
            case "fold":
                if even:
                    yield "subtrees", {"HEIGHT": 6, "LANES": 64, "BIAS": True}
            case "activate":
                if even:
                    yield "mirrored", _WORST_ACT
            case "path_grad":
                if even:
                    yield "mirrored", _WORST_ACT | {"NODES": True}


def cases(targets: Sequence[str], *, wide: bool = False) -> list[Case]:
    """Everything to compile, slowest kernels first so that two processes end together."""
    found = []
    for kernel in (
        "spread",
        "tile_dots",
        "leaf_dots",
        "tile_wgrad",
        "row_dots",
        "spread_rows",
        "path_grad",
        "activate",
        "fold",
    ):
        for target in targets:
            for dtype in get_args(DType):
                if kernel in {"activate", "path_grad"} and dtype == "bf16":
                    continue  # these see fp32 alone
                for config in configs(kernel, dtype):
                    for variant, switches in _variants(kernel, wide):
                        if not switches.get("EVEN", True) and config.bd <= 16:
                            continue  # d is padded to a multiple of 16
                        found.append(Case(kernel, variant, dtype, config, target, tuple(switches.items())))
    return found


def build(case: Case) -> Result:
    """Compile one case and read its needs from the binary. Needs a process where TRITON_INTERPRET was never set."""
    import importlib

    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    module = importlib.import_module(f"ablate.kernels.triton.{_MODULES[case.kernel]}")
    function = getattr(module, _FUNCTIONS.get(case.kernel, case.kernel))
    switches = dict(case.switches)
    blocks = {"BT": case.config.bt, "BD": case.config.bd, "BLOCK": case.config.bt}
    constants = {n: switches.get(n, blocks.get(n)) for n in function.arg_names if n.isupper()}
    signature = {n: "constexpr" if n in constants else _type(n, case.dtype) for n in function.arg_names}
    aligned = {n for n in function.arg_names if signature[n][0] == "*"} | {"d"}  # launch pads d to a multiple of 16
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(function.arg_names) if n in aligned}
    compiled = triton.compile(
        ASTSource(function, signature, constants, attrs),
        target=GPUTarget(*TARGETS[case.target]),
        options=case.config.options(),
    )
    needs = _nvidia(compiled) if TARGETS[case.target][0] == "cuda" else _amd(compiled)
    shared = int(compiled.metadata.shared)
    return Result(case.kernel, case.variant, case.config, case.dtype, case.target, *needs[:2], shared, *needs[2:])


def _type(name: str, dtype: DType) -> str:
    if name in _FLOAT:
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    return "*i32" if name in _INT32 else "*fp32" if name in _FP32 else f"*{dtype}"


def _nvidia(compiled: Any) -> tuple[int, int, int, int]:
    """Registers, stack bytes, matrix instructions and those in TF32; registers are unknown before a driver loads them,
    so cuobjdump, which Triton carries, reads the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"\b(REG|STACK):(\d+)", dump))
    matrix = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\S*", compiled.asm["ptx"])
    return int(used["REG"]), int(used["STACK"]), len(matrix), sum("tf32" in m for m in matrix)


def _amd(compiled: Any) -> tuple[int, int, int, int]:
    """Vector registers, spilled registers (vector and scalar), matrix instructions and those in XF32."""
    text = compiled.asm["amdgcn"]
    counts = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s*(\d+)", text)}
    matrix = re.findall(r"\bv_mfma_\S+", text)
    spilled = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
    return counts["vgpr_count"], spilled, len(matrix), sum("xf32" in m for m in matrix)


def compile_all(targets: Sequence[str], *, wide: bool = False, processes: int = 2) -> Iterator[Result]:
    """Compile `cases` in processes of their own with an empty cache, yielding results as `cases` orders them.

    Raises ValueError for an unknown target.
    """
    unknown = [t for t in targets if t not in TARGETS]
    if unknown:
        raise ValueError(f"target {unknown[0]!r} is not one of {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as cache:
        ours = {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
                yield from pool.map(build, cases(targets, wide=wide))
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def run(targets: Sequence[str] | None = None, as_json: bool = False) -> int:
    """Compile for the targets (all if None or empty) and print what each kernel needs, a line each.

    Returns 0, or 1 if a configuration spills or exceeds the target's shared memory. Raises ValueError for an unknown
    target.
    """
    fits = True
    if not as_json:
        columns = f"{'regs':>5}{'spills':>8}{'shared':>8}{'matrix':>8}"
        print(f"{'kernel':12}{'dtype':6}{'target':8}{'config':18}{columns}  variant", flush=True)
    for result in compile_all(targets or tuple(TARGETS)):
        fits &= result.fits
        if as_json:
            line = json.dumps(dataclasses.asdict(result) | {"config": result.config._asdict()})
        else:
            r, config = result, "x".join(str(v) for v in result.config)
            numbers = f"{r.registers:5}{r.spills:8}{r.shared_bytes:8}{r.matrix_instructions:8}"
            verdict = "" if r.fits else "  DOES NOT FIT"
            line = f"{r.kernel:12}{r.dtype:6}{r.target:8}{config:18}{numbers}  {r.variant}{verdict}"
        print(line, flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sys.exit(run(arguments.target, arguments.json))
