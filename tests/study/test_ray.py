"""The same study on a Ray cluster of two nodes gives the same table, also when a node dies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ablate.study.records import Layout
from ablate.study.runner import Outcome, run_study
from tests.study import objective
from tests.study.test_runner import table

ray = pytest.importorskip("ray")


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
