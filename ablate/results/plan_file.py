"""Read the plan that a study wrote before its first trial."""

from __future__ import annotations

import json
from typing import Any

from ablate.config import ConfigError
from ablate.results.layout import Layout


def load_plan(layout: Layout) -> dict[str, Any] | None:
    """plan.json as plain data, None where there is none; raises ConfigError for a damaged one."""
    try:
        data = json.loads(layout.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"plan {str(layout.plan)!r} is damaged: delete it and run the study again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"plan {str(layout.plan)!r} is damaged: delete it and run the study again")
    return data
