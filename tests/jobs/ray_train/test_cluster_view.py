"""A node's death is seen before the head knows of it, and then waited for."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from cluster.local.local_cluster import LocalCluster
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = pytest.mark.cluster

SCRIPT = """
import json, sys, time
import ray
from jobs.ray_train.cluster_view import gone_nodes, wait_until_known

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
ids = {node["NodeID"] for node in ray.nodes()}
print("found", json.dumps(sorted(gone_nodes(ids | {"f" * 56}))), flush=True)
sys.stdin.readline()  # a node is killed
since = time.monotonic()
while not (gone := gone_nodes(ids)):
    time.sleep(0.05)
seen_s, alive = time.monotonic() - since, [node["Alive"] for node in ray.nodes() if node["NodeID"] in gone]
wait_until_known(gone, timeout_s=float(sys.argv[2]))
known = [node["Alive"] for node in ray.nodes() if node["NodeID"] in gone]
print("found", json.dumps({"seen_s": seen_s, "alive": alive, "known": known}), flush=True)
"""


def test_a_killed_node_is_gone_at_once_and_known_later() -> None:
    with LocalCluster(num_nodes=2, cpus_per_node=1) as cluster:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, cluster.address, str(limit_s(60))],
            env=os.environ | cluster.environment | {"PYTHONPATH": str(REPOSITORY)},
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert found(process) == ["f" * 56]
        cluster.kill_node(cluster.node_names[-1])
        process.stdin.write("\n")
        process.stdin.close()
        result = found(process)
        assert process.wait(limit_s(60)) == 0
    assert result["seen_s"] < limit_s(2)
    assert result["alive"] == [True] and result["known"] == [False]


def found(process: subprocess.Popen[str]) -> Any:
    """Returns the script's next finding, among lines of Ray's own."""
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("found "))
    return json.loads(line.removeprefix("found "))
