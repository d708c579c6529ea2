"""The verb that starts a study: a commented study file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ablate.cli.common import ROOT, Name, among, app, example
from ablate.config.drafts import DESIGNS, new_study


@app.command()
@example("new mine --design search")
def new(
    name: Name,
    design: Annotated[str, typer.Option(help="factorial, one_at_a_time, search or confirm.")] = "factorial",
) -> None:
    """Write a commented study file, studies/NAME.yaml, with a schema beside it that editors read."""
    among([design], [*DESIGNS], "design")
    path = new_study(name, next(d for d in DESIGNS if d == design), ROOT)
    print(f"{path}: change it, then")
    print(f"  ablate study plan {path}   # arms, units and the predicted time")
    print(f"  ablate study run {path}")
    print(f"  ablate collect {name} && ablate analyse {name} && ablate report {name}")
    if Path("dvc.yaml").exists():
        print(f"or add {name} to params.yaml and call `dvc repro`")
