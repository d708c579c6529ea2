"""Names and sentences that several views share."""

from __future__ import annotations

from ablate.report.context import Context


def cap(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def many(count: int, noun: str) -> str:
    """Return a count with its noun: 1 test, 2 tests."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def short(factor: str) -> str:
    """Return a factor's name without its section and underscores."""
    return factor.partition(".")[2].replace("_", " ")


def no_factors(c: Context) -> str:
    """Return why this study has no analysis of factors, and what would give it one."""
    held = c.findings["effects"]["withheld"]
    if held:
        return " ".join(f"{w['endpoint']} is not analysed: {w['reason']}." for w in held)
    if c.findings["design"] == "factorial":
        return f"No factor has two levels with results yet: run `ablate study run studies/{c.tables.name}.yaml`."
    return (
        f"A `{c.findings['design']}` study has no factorial grid to analyse: write a study with `design: factorial` and run "
        "`ablate study run studies/NAME.yaml`."
    )
