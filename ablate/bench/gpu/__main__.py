"""`python -m ablate.bench.gpu FOLDER`: measure, then write gpu.json and index.html into the folder.

Needs PyTorch and Triton and no other package, and no network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the lane; return 0 where all was measured and right, 1 where a section failed or a result was wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m ablate.bench.gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="gpu.json and index.html are written here")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section begins that would end later (default 9)")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU in Triton's interpreter: tests this program only"
    )
    given = parser.parse_args()
    if given.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    import torch

    if not given.dry_run and not torch.cuda.is_available():
        print("no CUDA or ROCm device is here; --dry-run tests the program without one", file=sys.stderr)
        return 2
    from ablate.bench.gpu import measure, training
    from ablate.bench.gpu.lane import Section, Setup, run_all
    from ablate.bench.gpu.page import page
    from ablate.files import write_text

    # The order is that of worth: what could not be known before comes first.
    sections = [
        Section(name="machine", title="What the machine reaches", run=measure.machine, seconds=10),
        Section(name="correctness", title="Every strategy against the reference", run=measure.correctness, seconds=60),
        Section(name="repeats", title="Repeats, bit for bit, and from a graph", run=measure.repeats, seconds=20),
        Section(name="contenders", title="One layer beside others", run=measure.contenders, seconds=120),
        Section(name="predictions", title="Predictions beside measurements", run=measure.predictions, seconds=40),
        Section(name="decoding", title="One layer on one token", run=measure.decoding, seconds=20),
        Section(name="steps", title="Whole training steps", run=training.steps, seconds=100),
        Section(name="gpu_tests", title="pytest -m gpu", run=measure.gpu_tests, seconds=150),
    ]
    setup = Setup(device="cpu" if given.dry_run else "cuda", dry=given.dry_run)
    outcomes = run_all(sections, setup, given.minutes)
    about = _about(given.dry_run)
    record = {"about": about, "sections": [asdict(outcome) for outcome in outcomes]}
    given.folder.mkdir(parents=True, exist_ok=True)
    write_text(given.folder / "gpu.json", json.dumps(record, indent=1) + "\n")
    write_text(given.folder / "index.html", page(about, outcomes))
    wrong = [row for o in outcomes for row in o.rows if row.get("right") is False or row.get("bitwise_equal") is False]
    print(f"{given.folder / 'index.html'} and gpu.json: {len(outcomes)} sections, "
          f"{sum(bool(o.error) for o in outcomes)} failed or not begun, {len(wrong)} wrong results")  # fmt: skip
    return 1 if wrong or any(o.error for o in outcomes) else 0


def _about(dry: bool) -> dict[str, Any]:
    import torch
    import triton  # type: ignore[import-untyped]

    import ablate

    return {
        "device": "Triton's interpreter (dry run)" if dry else torch.cuda.get_device_name(),
        "capability": "–" if dry else ".".join(map(str, torch.cuda.get_device_capability())),
        "memory GiB": "–" if dry else round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "ablate": ablate.__version__,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
