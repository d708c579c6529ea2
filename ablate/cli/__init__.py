"""The `ablate` command: one verb per thing a user does. Imports are inside the commands, so that `--help` is quick."""

from typing import NoReturn

from ablate.cli import early


def main() -> NoReturn:
    """Entry point: answer Ctrl-C from the first line on, then import the commands and run the one that was asked for."""
    early.answer("stopped before anything was done")
    from ablate.cli.commands import run

    early.answer(f"stopped; {early.GOES_ON}")
    run()


__all__ = ["early", "main"]
