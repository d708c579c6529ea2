"""Measures small studies for `test_forecast.py`: `python -m tests.study.timings FOLDER`, on a machine with nothing else to do.

Each is predicted as `ablate study plan` does, run by `ablate study run` on two workers, and both are written, with the
parts that the prediction was made of, to timings.json beside this file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ablate.config import Study, parse
from ablate.results.layout import Layout
from ablate.study.designs import expand
from ablate.study.forecast import ends, has_stores, shapes_of, to_do
from ablate.study.kernels import compile_kernels
from ablate.study.probes import measure
from ablate.study.rates import traces
from ablate.tracking.store import default_uri
from ablate.tracking.tracker import MlflowTracker

FILE = Path(__file__).with_name("timings.json")
WORKERS = 2
SHORT = {"train": {"steps": 16, "batch_size": 4, "eval_every": 8, "eval_tokens": 16384}}
STUDIES: dict[str, dict[str, Any]] = {
    "search": {
        "design": "search",
        "match": "total_units",
        "objectives": ["bpb", "n_eff_frac"],
        "budget": {"trials": 13},
        "base": SHORT,
        "factors": {
            "tree.depth": {"range": {"low": 2, "high": 8}},
            "tree.leaf_width": [1, 2, 4, 8],
            "tree.activation": ["gelu", "relu", "relu2", "silu"],
            "tree.mirror": {"range": {"low": -1, "high": 1}},
            "train.lr": {"range": {"low": 0.001, "high": 0.02, "log": True}},
        },
        "seeds": [0, 1, 2],
        "finalists": {"count": 2, "seeds": [100, 101]},
    },
    "factorial": {
        "design": "factorial",
        "base": SHORT,
        "factors": {"tree.depth": [3, 6], "tree.mirror": [0, 1]},
        "controls": ["total"],
        "seeds": [0],
    },
    "facts": {
        "design": "factorial",
        "preset": "facts",
        "margin": 0.1,
        "base": {"train": {"steps": 100, "eval_every": 50}},
        "factors": {"tree.mirror": [0, 1]},
        "seeds": [0, 1],
    },
    "first": {
        **yaml.safe_load((Path(__file__).parents[2] / "studies" / "first.yaml").read_text(encoding="utf-8")),
        "seeds": [400, 401],
    },
}


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    (root / "studies").mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, settings in STUDIES.items():
        found[name] = _timed(name, {**settings, "name": name}, root)
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _timed(name: str, settings: dict[str, Any], root: Path) -> dict[str, Any]:
    file = root / "studies" / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    study, layout = parse(Study, settings), Layout(root, name)
    known, _ = traces(study, layout)
    chosen = ends(shapes_of(to_do(expand(study, known), known, layout)[0]))
    compile_kernels(chosen.values(), root, print)
    costs, start = measure(
        chosen, root=root, data_root=root / "data", workers=WORKERS, tracker=MlflowTracker(default_uri(root))
    )
    new_stores = not has_stores(root)
    print(name, costs.values(), start, flush=True)
    command = [str(Path(sys.executable).with_name("ablate")), "study", "run", str(file), "--workers", str(WORKERS)]
    began = time.time()
    subprocess.run(command, cwd=root, check=True)
    return {
        "costs": [asdict(cost) for cost in costs.values()],
        "start": asdict(start),
        "new_stores": new_stores,
        "seconds": time.time() - began,
    }


if __name__ == "__main__":
    main()
