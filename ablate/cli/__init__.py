"""The `ablate` command: one verb per thing a user does. Imports are inside the commands, so that `--help` is quick."""

from ablate.cli import drafts, early, exporting, models, pipeline, speed, studies
from ablate.cli.common import main

__all__ = ["drafts", "early", "exporting", "main", "models", "pipeline", "speed", "studies"]
