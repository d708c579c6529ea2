"""The same study on a Ray cluster of two nodes gives the same table, also when a node dies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ablate.config import load_study
from ablate.results.collect import collect
from ablate.results.layout import Layout
from ablate.study.outcome import Outcome
from ablate.study.runner import run_study
from ablate.study.threads import available_cpus
from tests.study import objective
from tests.study.test_runner import table

ray = pytest.importorskip("ray")
TIMING = ["seconds", "tokens_per_second", "train_seconds", "run_id"]


@pytest.fixture
def cluster() -> Iterator[object]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    repository = str(Path(__file__).parents[2])
    ray.init(
        address=made.address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": repository}},
    )
    yield made
    ray.shutdown()
    made.shutdown()  # type: ignore[no-untyped-call]


@pytest.mark.soak
@pytest.mark.parametrize("dies", [False, True], ids=["undisturbed", "a-node-dies"])
def test_two_nodes_give_the_table_of_local_workers(cluster: object, tmp_path: Path, dies: bool) -> None:
    from ablate.study.ray_engine import RayEngine

    here, there = tmp_path / "local", tmp_path / "ray"
    assert run_study(objective.study(), here, run=objective.descend) == Outcome(8, 8)
    layout = Layout(there, "cheap")

    def kill_a_node() -> None:
        while len(layout.done()) < 2:
            time.sleep(0.1)
        nodes = cluster.list_all_nodes()  # type: ignore[attr-defined]
        cluster.remove_node(nodes[-1], allow_graceful=False)  # type: ignore[attr-defined]

    killer = threading.Thread(target=kill_a_node, daemon=True)
    if dies:
        killer.start()
    engine = RayEngine(2)
    assert run_study(objective.study(), there, run=objective.slow, engine=engine) == Outcome(8, 8)
    assert table(there) == table(here)


@pytest.mark.soak
def test_the_smoke_study_on_two_nodes_gives_the_table_of_local_workers(cluster: object, tmp_path: Path) -> None:
    from ablate.study.ray_engine import RayEngine

    study = load_study(Path(__file__).parents[2] / "studies" / "smoke.yaml")
    here, there, data = tmp_path / "local", tmp_path / "ray", tmp_path / "data"
    # As many threads as a Ray task has: sums depend on how they are divided.
    assert run_study(study, here, workers=available_cpus(), data_root=data) == Outcome(6, 6)
    assert run_study(study, there, data_root=data, engine=RayEngine(2)) == Outcome(6, 6)
    for name in ("trials", "history", "usage"):
        tables = [pl.read_parquet(collect("smoke", root) / f"{name}.parquet") for root in (here, there)]
        one, two = (t.drop(TIMING, strict=False) for t in tables)
        assert_frame_equal(one, two)
