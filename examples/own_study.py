"""A study made in code: run it, look at its results as polars frames, draw one plot.

Each part below `# %%` is a cell in Jupyter, VS Code and Spyder. As a script, from any folder: `python examples/own_study.py`.
Everything it writes goes to a temporary folder; it takes some seconds on two cores.
"""

# %%
from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib
import polars as pl

import ablate

matplotlib.use("Agg")  # a notebook does without this line and shows the plot itself
import matplotlib.pyplot as plt

# %%
study = ablate.Study(
    name="own_study",
    title="An even nonlinearity against GELU, in miniature: too small to conclude anything",
    design="one_at_a_time",
    base={
        "corpus": {"max_documents": 40, "vocab_size": 300},  # of the Python standard library
        "model": {"d_model": 16, "blocks": 1, "heads": 2, "context": 32},
        "tree": {"trees": 2, "depth": 2, "leaf_width": 2},
        "train": {"steps": 10, "batch_size": 8, "eval_every": 5, "eval_tokens": 1024},
    },
    factors={"tree.mirror": [0, 1]},
    seeds=[0, 1],
)


# %%
def draw(history: pl.DataFrame, path: Path) -> None:
    """Draw the share of leaves in effective use over training, a line a trial."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for (arm, seed), rows in history.group_by("arm", "seed", maintain_order=True):
        colour = "C1" if "1" in str(arm) else "C0"
        axes.plot(rows["step"], rows["n_eff_frac"], marker="o", color=colour, label=f"{arm}, seed {seed}")
    axes.set(xlabel="optimizer step", ylabel="leaves in effective use", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


# %%
def main(folder: Path) -> None:
    """Run the study and show what it gave. Workers are processes that import this file, so it needs a main guard."""
    results = ablate.run_study(study, folder)
    columns = ["arm", "seed", "bpb", "n_eff_frac", "dead_frac", "active_units"]
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=100):
        print(results.trials.select(columns).sort("arm", "seed"))
    for text in results.verdicts["text"]:
        print(text)
    print(f"{results.balance.height} rows of balance, one a tree and evaluation")
    draw(results.history, folder / "balance.png")
    results.to_csv(folder / "csv")
    results.to_tensorboard(folder / "tensorboard")
    print("written:", *sorted(p.name for p in folder.rglob("*.csv")), "balance.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
