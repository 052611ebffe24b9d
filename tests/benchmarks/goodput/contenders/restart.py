"""A plain restart: whenever the nodes have changed, all workers end, and as many as there are nodes
begin again from the newest checkpoint.

The scheduler is the benchmark itself, which knows of a change at once: the best that one can do. It
first asks workers to save and leave, and kills those that have not left in time.

Run as `restart SETTINGS`, a JSON object, it is one worker.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster.local.local_cluster import LocalCluster, free_port
from tests.benchmarks.goodput.contenders.contract import BATCH, Contender
from tests.benchmarks.goodput.contenders.peer_settings import peer_settings
from tests.benchmarks.goodput.records import Event, Mark, Step, read_log, write_mark
from tests.bound_process import start_bound
from tests.repository import REPOSITORY

_STATE = "state.pt"
_GRACE_STEPS = 2.0  # the time of steps of one worker that a group has to save and leave
_TIMEOUT = timedelta(seconds=60)


class Restart(Contender):
    name = "restart"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._nodes: list[str] = []
        self._workers: dict[str, subprocess.Popen[bytes]] = {}  # by node
        self._is_stale = False  # the group is not of the nodes that are there
        self._leave_until_s: float | None = None  # while a group is asked to leave

    @contextmanager
    def training(self, cluster: LocalCluster) -> Iterator[None]:
        Path(peer_settings(self)["storage"]).mkdir()
        try:
            yield
        finally:
            self._kill(self._workers)

    def read(self) -> tuple[list[Step], list[Mark]]:
        return read_log(Path(peer_settings(self)["log"]))

    def node_came(self, name: str) -> None:
        self._nodes.append(name)
        self._is_stale = True

    def node_warned(self, name: str, deadline_s: float) -> None:
        for worker in self._workers.values():
            worker.send_signal(signal.SIGUSR1)  # save after this step

    def node_went(self, name: str) -> None:
        self._nodes.remove(name)
        self._kill([name])
        self._is_stale = True
        self._leave_until_s = 0.0  # the others cannot complete a step without it

    def tick(self) -> None:
        """Brings the group to the nodes that are there."""
        ended = [worker for worker in self._workers.values() if worker.poll() is not None]
        if not self._is_stale and not ended:
            return
        self._is_stale, now_s = True, time.monotonic()
        if self._leave_until_s is None:
            self._leave_until_s = now_s + _GRACE_STEPS * BATCH * self.settings.row_s
            for worker in self._workers.values():
                worker.terminate()
        if len(ended) == len(self._workers) or now_s > self._leave_until_s:
            self._kill(self._workers)
            self._is_stale, self._leave_until_s = False, None
            self._start()

    def _start(self) -> None:
        port = free_port()
        for rank, name in enumerate(self._nodes):
            place = {"rank": rank, "world_size": len(self._nodes), "port": port}
            module = "tests.benchmarks.goodput.contenders.restart"
            self._workers[name] = start_bound(
                [sys.executable, "-m", module, json.dumps(peer_settings(self) | place)],
                log=self.folder / "workers.log",
                environment={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            )

    def _kill(self, names: Any) -> None:
        for name in list(names):
            worker = self._workers.pop(name, None)
            if worker is not None:
                worker.kill()
                worker.wait()


class Asked:
    """What signals ask a worker: 1 to save, 2 to save and leave."""

    def __init__(self) -> None:
        self.level = 0
        for number, level in ((signal.SIGUSR1, 1), (signal.SIGTERM, 2)):
            signal.signal(number, partial(self._hear, level))

    def _hear(self, level: int, *_: object) -> None:
        self.level = max(self.level, level)


def main(settings: dict[str, Any]) -> None:
    asked, log = Asked(), Path(settings["log"])
    write_mark(log, Event.STARTED, time_s=psutil.Process().create_time())
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from tests.benchmarks.goodput.contenders.ddp_loop import DdpLoop

    rank, world_size = settings["rank"], settings["world_size"]
    address = f"tcp://127.0.0.1:{settings['port']}"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=world_size, timeout=_TIMEOUT
    )
    write_mark(log, Event.MET)
    file = Path(settings["storage"]) / _STATE
    saved = file if file.exists() else None
    loop = DdpLoop(
        settings, rank=rank, world_size=world_size, wrap=DistributedDataParallel, saved=saved
    )
    while True:
        loop.take_step()
        level = loop.agree(asked=asked.level)
        asked.level = 0 if level < 2 else asked.level
        if rank == 0 and (level or loop.is_due):
            loop.save(file)
        if level == 2:
            return


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
