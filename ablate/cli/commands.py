"""Every verb, added to the app by the import of its module."""

from ablate.cli import drafts, exporting, models, pipeline, speed, studies
from ablate.cli.common import app, run

__all__ = ["app", "drafts", "exporting", "models", "pipeline", "run", "speed", "studies"]
