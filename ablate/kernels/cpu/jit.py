"""How every CPU kernel is compiled: without the GIL, without bounds checks, cached on disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import numba as nb


def jit(function: Callable[..., Any] | None = None, *, fastmath: Set[str] = frozenset()) -> Any:
    """Compile a kernel on its first call; `fastmath` names LLVM's permitted rewrites.

    Where neither the package's folder nor the user's cache can be written, Numba refuses to decorate at all; such a
    machine compiles again in every process instead.
    """
    if function is None:
        return lambda f: jit(f, fastmath=fastmath)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": set(fastmath)}
    try:
        return nb.njit(cache=True, **options)(function)
    except RuntimeError:
        return nb.njit(**options)(function)
