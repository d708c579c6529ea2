"""Read a study file and check it before anything is trained or overwritten."""

from __future__ import annotations

from pathlib import Path

import yaml

from ablate.config.section import ConfigError, parse
from ablate.config.study import Study


def load_study(path: Path) -> Study:
    """Read and check a study file; raises ConfigError for a file that is missing, binary, empty or not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none there"
        raise ConfigError(f"study file {str(path)!r} does not exist; studies beside it: {known}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"study file {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"study file {str(path)!r} is not text: a YAML file is expected") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"study file {str(path)!r} is not YAML{line}: {getattr(error, 'problem', None) or 'not readable'}"
        ) from None
    if not isinstance(data, dict):
        what = "empty" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"study file {str(path)!r} is {what}: a mapping with name, factors, … is expected")
    return parse(Study, {"name": path.stem, **data})
