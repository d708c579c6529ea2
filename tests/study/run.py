"""Runs the cheap study in a process of its own: `python -m tests.study.run ROOT WORKERS RUN [SETTINGS as JSON] [TRACKING]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ablate.cli import early


def main() -> None:
    early.answer("stopped before anything was done")  # as the command does, whose imports these are
    from ablate.cli.common import run

    early.answer("stopped; what was finished is kept")
    run(study)


def study() -> None:
    from ablate.study.runner import run_study
    from tests.study import objective

    root, workers, run, *rest = sys.argv[1:]
    settings, tracking = [*rest, *("{}", "")[len(rest) :]]
    tracker = None
    if tracking:
        from ablate.tracking.tracker import MlflowTracker

        tracker = MlflowTracker(tracking)
    found = objective.study(**json.loads(settings))
    outcome = run_study(found, Path(root), workers=int(workers), run=getattr(objective, run), tracker=tracker)
    print(f"{outcome.done} of {outcome.total} trials done. {outcome.message}".rstrip())
    if outcome.signal is not None:
        print("ablate: stopped", file=sys.stderr)
    for failure in outcome.failed:
        print(f"ablate: failed: {failure}", file=sys.stderr)
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main()
