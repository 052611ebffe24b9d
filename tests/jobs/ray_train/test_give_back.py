"""A controller that ends by itself gives back what it asked of the cluster, on a real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local.local_cluster import LocalCluster
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# A controller, by its policy: whether it finds room within some seconds, and whether it then ends
# as the watch ends it. Nothing cancels the request of one that is killed.
CONTROLLER = """
import os, sys, time
from types import SimpleNamespace
import ray
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.config import ScalingConfig
from cluster.storage.uris import open_storage
from jobs.ray_train.lending_policy import LendingPolicy, give_back

_, address, folder, name, wait_s, gives_back = sys.argv
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
num = int(ray.cluster_resources()["CPU"])
workers = ScalingConfig(num_workers=(1, num), resources_per_worker={"CPU": 1})
policy = LendingPolicy(workers, open_storage(folder), open_storage(f"{folder}/run"), {})
run = SimpleNamespace(run_id=name, run_config=SimpleNamespace(storage_path=folder))
policy.after_controller_start(run)
end_s = time.monotonic() + float(wait_s)
found = None
while found is None and time.monotonic() < end_s:
    decision = policy.make_decision_for_non_running_worker_group()
    found = decision.num_workers if isinstance(decision, ResizeDecision) else None
    time.sleep(0.2)
print("found", found, "of", num, flush=True)
if gives_back == "yes":
    give_back()
os._exit(0)
"""


def test_the_next_controller_finds_what_the_one_before_gave_back(tmp_path: Path) -> None:
    with LocalCluster(num_nodes=2, cpus_per_node=1) as cluster:

        def controller(name: str, *, wait_s: float, gives_back: bool) -> list[str]:
            words = [cluster.address, str(tmp_path), name, str(wait_s)]
            run = subprocess.run(
                [sys.executable, "-c", CONTROLLER, *words, "yes" if gives_back else "no"],
                env=os.environ | cluster.environment | {"PYTHONPATH": str(REPOSITORY)},
                capture_output=True,
                text=True,
                check=True,
            )
            (line,) = [it for it in run.stdout.splitlines() if it.startswith("found")]
            return line.split()

        _, number, _, most = controller("first", wait_s=limit_s(20), gives_back=True)
        assert number == most
        _, number, _, most = controller("second", wait_s=limit_s(20), gives_back=False)
        assert number == most, "what the first one gave back is free at once"
        _, number, _, _ = controller("third", wait_s=10, gives_back=True)
        assert number == "None", "what was not given back is held for three minutes"
