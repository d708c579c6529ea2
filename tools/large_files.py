"""Refuse files over a size: `python -m tools.large_files KB FILE ...`, for the pre-commit hook."""

from __future__ import annotations

import sys
from pathlib import Path


def main(limit: str, *files: str) -> int:
    """Return 1, and name each file over `limit` kB on a line; 0 where there is none."""
    found = [(name, Path(name).stat().st_size) for name in files if Path(name).stat().st_size > int(limit) * 1000]
    for name, size in found:
        print(f"{name} is {size / 1000:.0f} kB: files of {limit} kB at most are kept in git")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
