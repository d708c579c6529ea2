"""The verb that writes results for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ablate.cli.common import ROOT, Name, among, app, example
from ablate.cli.waiting import busy
from ablate.results.layout import Layout

FORMATS = ["csv", "tensorboard"]


@app.command()
@example("export first --format tensorboard")
def export(
    name: Name,
    form: Annotated[str, typer.Option("--format", help="csv or tensorboard.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="Folder; out/NAME/FORMAT if not given.", show_default=False)] = None,
) -> None:
    """Write a study's trials, curves, balance and verdicts as CSV, or its curves for TensorBoard; published ones too."""
    among([form], FORMATS, "format")
    folder = out or Layout(ROOT, name).report / form
    with busy(f"reading {name}"):
        from ablate.api import load

        results = load(name, ROOT)
        print(results.to_csv(folder) if form == "csv" else results.to_tensorboard(folder))
