"""Runs the cheap study in a process of its own: `python -m tests.study.run ROOT WORKERS RUN [SETTINGS as JSON]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ablate.config import ConfigError
from ablate.study.runner import run_study
from tests.study import objective


def main() -> int:
    root, workers, run, *settings = sys.argv[1:]
    try:
        study = objective.study(**json.loads(settings[0] if settings else "{}"))
        return run_study(study, Path(root), workers=int(workers), run=getattr(objective, run)).exit_code
    except ConfigError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
