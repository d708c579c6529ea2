"""The order of the sections, the time each may take, and what is kept of one that fails."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Where and on which sizes the sections run. `dry`: tiny sizes on the CPU, in Triton's interpreter."""

    device: str
    dry: bool

    def sync(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One thing to measure. `seconds` is what it is expected to take; it is not begun with less time left."""

    name: str
    title: str
    run: Callable[[Setup], Rows]
    seconds: float


@dataclass(kw_only=True)
class Outcome:
    """What a section gave: rows, or why there are none."""

    name: str
    title: str
    rows: Rows = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def run_all(sections: list[Section], setup: Setup, minutes: float) -> list[Outcome]:
    """Run sections in order until the time is used. A section that fails is recorded, and the next one runs."""
    started, outcomes = time.monotonic(), []
    for section in sections:
        left = minutes * 60 - (time.monotonic() - started)
        outcome = Outcome(name=section.name, title=section.title)
        outcomes.append(outcome)
        if left < section.seconds:
            outcome.error = f"not begun: it takes about {section.seconds:.0f} s, and {max(left, 0):.0f} s were left"
            continue
        print(f"{section.title} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            outcome.rows = section.run(setup)
            setup.sync()
        # A kernel can fail in any way on hardware that nobody has tried, and the other sections must still be measured.
        except Exception as error:
            traceback.print_exc()
            outcome.error = f"{type(error).__name__}: {error}".splitlines()[0][:400]
        outcome.seconds = time.monotonic() - began
        print(f"  {outcome.seconds:.1f} s{'  FAILED: ' + outcome.error if outcome.error else ''}", file=sys.stderr)
    return outcomes
