"""Read a study file and check it before anything is trained or overwritten."""

from __future__ import annotations

from pathlib import Path

from ablate.config.errors import ConfigError
from ablate.config.section import parse
from ablate.config.study import Study
from ablate.config.text import load_yaml, read_text


def load_study(path: Path) -> Study:
    """Read and check a study file; raises ConfigError for a file that is missing, binary, empty or not YAML."""
    where = f"study file {str(path)!r}"
    try:
        text = read_text(path, where)
    except FileNotFoundError:
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none there"
        raise ConfigError(f"{where} does not exist; studies beside it: {known}") from None
    data = load_yaml(text, where)
    if not isinstance(data, dict):
        what = "empty" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{where} is {what}: a mapping with name, factors, … is expected")
    return parse(Study, {"name": path.stem, **data})
