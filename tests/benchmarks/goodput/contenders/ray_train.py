"""Stock Ray Train v2, elastic, as its documentation has it: a checkpoint each few steps, unlimited
failures, and one more checkpoint when `get_preemption_info` tells of a node's end.

Run as `ray_train SETTINGS`, a JSON object, against the cluster of RAY_ADDRESS.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.local.local_cluster import LocalCluster
from tests.benchmarks.goodput.contenders.contract import MAX_NODES, Contender
from tests.benchmarks.goodput.contenders.peer_settings import peer_settings
from tests.benchmarks.goodput.records import Event, Mark, Step, read_log, write_mark
from tests.bound_process import start_bound
from tests.repository import REPOSITORY

_STATE = "state.pt"


class RayTrain(Contender):
    name = "ray_train"

    @contextmanager
    def training(self, cluster: LocalCluster) -> Iterator[None]:
        self._cluster = cluster
        self._start()
        try:
            yield
        finally:
            self._driver.terminate()
            try:
                self._driver.wait(20)
            finally:
                self._driver.kill()

    def tick(self) -> None:
        """Starts a run again that has ended by an error, as a supervisor does: Ray Train gives up where a
        node goes while workers are told to train. It continues from the newest checkpoint."""
        if self._driver.poll() is not None:
            self._start()

    def _start(self) -> None:
        settings = peer_settings(self) | {"max_nodes": MAX_NODES}
        module = "tests.benchmarks.goodput.contenders.ray_train"
        environment = {
            "RAY_ADDRESS": self._cluster.address,
            "PYTHONPATH": str(REPOSITORY),
            # Of 5 s, which a compressed notice has not
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        }
        self._driver = start_bound(
            [sys.executable, "-m", module, json.dumps(settings)],
            log=self.folder / "driver.log",
            environment=self._cluster.environment | environment,
        )

    def read(self) -> tuple[list[Step], list[Mark]]:
        return read_log(Path(peer_settings(self)["log"]))


def train_worker(settings: dict[str, Any]) -> None:
    import ray.train
    from ray.train import Checkpoint
    from ray.train.torch import prepare_model

    from tests.benchmarks.goodput.contenders.ddp_loop import DdpLoop

    log = Path(settings["log"])
    write_mark(log, Event.STARTED, time_s=psutil.Process().create_time())
    write_mark(log, Event.MET)  # Ray Train calls this once all are connected
    context = ray.train.get_context()
    with tempfile.TemporaryDirectory() as scratch:
        saved = None
        if checkpoint := ray.train.get_checkpoint():
            saved = Path(checkpoint.to_directory(scratch)) / _STATE
        loop = DdpLoop(
            settings,
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            wrap=prepare_model,
            saved=saved,
        )
    told = None
    while True:
        loop.take_step()
        info = ray.train.get_preemption_info() if settings["has_notices"] else None
        is_news = info is not None and info != told
        told = info
        if not (loop.is_due or is_news):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if loop.rank == 0:
                loop.save(Path(folder) / _STATE)
            stored = Checkpoint(folder) if loop.rank == 0 else None
            ray.train.report({"step": loop.step}, checkpoint=stored)


def main(settings: dict[str, Any]) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}}, log_to_driver=False)
    TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(1, settings["max_nodes"]),
            elastic_resize_monitor_interval_s=settings["look_s"],
        ),
        run_config=RunConfig(
            name="spot",
            storage_path=settings["storage"],
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
