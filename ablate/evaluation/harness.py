"""Whether EleutherAI's lm-eval harness, which asks questions, is installed; found out without importing it or torch."""

from __future__ import annotations

from importlib.util import find_spec

from ablate.config import ConfigError

MISSING = "question answering needs the extra qa: pip install 'ablate[qa]'"


def installed() -> bool:
    """Return whether `lm_eval` can be imported."""
    return find_spec("lm_eval") is not None


def require() -> None:
    """Raise ConfigError where `lm_eval` is not installed."""
    if not installed():
        raise ConfigError(MISSING)
