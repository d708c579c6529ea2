"""The `ablate` command: one verb per thing a user does. Imports are inside the commands, so that `--help` is quick."""

from ablate.cli import drafts, models, pipeline, speed
from ablate.cli.common import main

__all__ = ["drafts", "main", "models", "pipeline", "speed"]
