"""The `ablate` command: one verb per thing a user does. Imports are inside the commands, so that `--help` is quick."""

from ablate.cli import models, pipeline, speed
from ablate.cli.common import main

__all__ = ["main", "models", "pipeline", "speed"]
