"""A machine's own GPUs: lent by the nodes of the local cluster, asked for by `true` or `auto`."""

import os
import subprocess
import sys

import pytest

from cluster.local.local_cluster import LocalCluster, gpus_per_node
from cluster.settings import amounts
from cluster.settings.flags import validate_config
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from tests.time_limits import limit_s


@pytest.mark.parametrize(
    ("num_gpus", "num_nodes", "together", "lent"),
    [
        (0, 3, 1, 0),
        (1, 3, 1, 1),
        (1, 1, 1, 1),
        (4, 3, 1, 2),
        (3, 3, 1, 2),
        (2, 3, 2, 2),
        (8, 3, 4, 4),
    ],
)
def test_nodes_share_the_gpus_and_split_none_that_work_together(
    num_gpus: int, num_nodes: int, together: int, lent: int
) -> None:
    assert gpus_per_node(num_gpus, num_nodes, together=together) == lent


@pytest.mark.parametrize("number", [0, 2])
def test_auto_is_settled_by_this_machine_and_refused_for_another(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amounts, "num_gpus_here", lambda: number)
    values = {"scaling": {"use_gpu": "auto"}, "data": {"source": "x"}, "model": {"preset": "tiny"}}
    assert validate_config(values, RunConfig).scaling.use_gpu is (number > 0)
    elsewhere = values | {"cluster": {"address": "http://head:8265"}}
    with pytest.raises(
        ConfigError, match="asks this machine, and the run is on the cluster at http"
    ):
        validate_config(elsewhere, RunConfig)


_ASKS = """
import os, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
hold = ray.remote(num_gpus=1)(type("Hold", (), {"of": lambda self: os.environ["CUDA_VISIBLE_DEVICES"]}))
actors = [hold.remote() for _ in range(2)]
print(*sorted(ray.get([actor.of.remote() for actor in actors])))
"""


def lent(cluster: LocalCluster) -> dict[str, float]:
    """Returns the GPUs of each node that has any, as Ray counts them."""
    nodes = {row["node_name"]: row["resources_total"] for row in cluster.jobs_api.alive_nodes()}
    return {
        name: node["GPU"]
        for name, node in nodes.items()
        if name in cluster.node_names and "GPU" in node
    }


@pytest.mark.cluster
def test_each_worker_has_a_gpu_of_its_own_and_a_new_node_those_of_a_killed_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray takes a node's word for its GPUs: these two are not there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with LocalCluster(num_nodes=2, cpus_per_node=2, num_gpus=2) as cluster:
        assert lent(cluster) == {"node-1": 2}
        asked = subprocess.run(
            [sys.executable, "-c", _ASKS],
            env=os.environ | cluster.environment | {"RAY_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            timeout=limit_s(120),
            check=False,
        )
        assert asked.stdout.split() == ["5", "7"], asked.stderr
        cluster.kill_node("node-1")
        cluster.add_node()
        assert lent(cluster) == {"node-2": 2}
