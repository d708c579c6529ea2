"""Run the study in own_study.yaml from Python and print its table of trials.

Everything it writes goes to a temporary folder. Run it from the project's folder: `python examples/own_study.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl

from ablate.config import load_study
from ablate.results.collect import collect
from ablate.study.runner import run_study


def main() -> None:
    """Run every trial, export the tables, and show one row a trial."""
    study = load_study(Path(__file__).with_suffix(".yaml"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        outcome = run_study(study, root, workers=1)
        print(f"{outcome.done} of {outcome.total} trials done")
        collect(study.name, root)
        trials = pl.read_parquet(root / "tables" / study.name / "trials.parquet")
    columns = ["arm", "seed", "bpb", "n_eff_frac", "dead_frac", "active_units"]
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=100):
        print(trials.select(columns).sort("arm", "seed"))


if __name__ == "__main__":
    main()
