"""How every CPU kernel is compiled: without the GIL, without bounds checks, cached on disk where that is possible.

Numba asks only whether the file of a kernel has changed, not the files of the functions compiled into it. So the cache
is a folder named after the contents of all kernel files: a change to one of them never meets old code of another.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import numba as nb

CPU = Path(__file__).parent
config: Any = nb.config  # Numba makes its settings at import, where type checkers do not see them
SOURCES = (CPU, CPU.parent / "ragged")
"""The folders whose files hold compiled functions."""


def jit(function: Callable[..., Any] | None = None, *, fastmath: Set[str] = frozenset()) -> Any:
    """Compile a kernel on its first call; `fastmath` names LLVM's permitted rewrites.

    Where neither the package's folder nor the user's cache can be written, Numba refuses to decorate at all; such a
    machine compiles again in every process instead.
    """
    if function is None:
        return lambda f: jit(f, fastmath=fastmath)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": set(fastmath)}
    before = config.CACHE_DIR
    config.CACHE_DIR = str(_cache(before))
    try:
        return nb.njit(cache=True, **options)(function)
    except RuntimeError:
        return nb.njit(**options)(function)
    finally:
        config.CACHE_DIR = before


@functools.cache
def _cache(chosen: str) -> Path:
    """Return the folder of compiled kernels: under `chosen` (NUMBA_CACHE_DIR), in the package, or in the user's cache."""
    name = f"kernels-{digest(SOURCES)}"
    if chosen:
        return Path(chosen) / name
    if os.access(CPU, os.W_OK):
        return CPU / "__pycache__" / name
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ablate" / name


def digest(folders: tuple[Path, ...]) -> str:
    """Return twelve hex digits over the names and contents of the Python files in these folders."""
    total = hashlib.sha256()
    for path in sorted(file for folder in folders for file in folder.glob("*.py")):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]
