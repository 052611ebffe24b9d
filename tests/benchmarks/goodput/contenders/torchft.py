"""torchft 0.2: a replica on each node, DistributedDataParallel over gloo, its lighthouse, as in its
`train_ddp.py`.

Its batch is a number of rows for each replica, so it shrinks with the nodes. The data are divided for
the largest number of replicas; each replica stores its place in them at every step, and the state
each few steps, as that example advises. Replicas are processes that the benchmark starts and ends
with the nodes, as a scheduler does.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.local.local_cluster import LocalCluster, free_port
from tests.benchmarks.goodput.contenders.contract import BATCH, MAX_NODES, Contender
from tests.benchmarks.goodput.contenders.peer_settings import peer_settings
from tests.benchmarks.goodput.records import Mark, Step, read_lines, read_log
from tests.bound_process import start_bound
from tests.repository import REPOSITORY

PYTHON = REPOSITORY / ".venv-torchft/bin/python"
"""An environment of its own; RAYMILL_TORCHFT_PYTHON names another one."""

_LIGHTHOUSE = [
    # The README's line, but for the heartbeats: 5 s by default, while the other contenders' nodes
    # are found dead after three seconds.
    *("--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", "10000"),
    *("--heartbeat_timeout_ms", "3000"),
]


def python() -> Path:
    return Path(os.environ.get("RAYMILL_TORCHFT_PYTHON", PYTHON))


class Torchft(Contender):
    name = "torchft"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._replicas: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}  # by node

    @classmethod
    def missing(cls) -> str:
        if python().exists():
            return ""
        return f"there is no {python()}; `make .venv-torchft/.installed` makes it"

    @contextmanager
    def training(self, cluster: LocalCluster) -> Iterator[None]:
        Path(peer_settings(self)["storage"]).mkdir()
        address = f"127.0.0.1:{free_port()}"
        self._address = f"http://{address}"
        program = str(python().with_name("torchft_lighthouse"))
        lighthouse = start_bound(
            [program, "--bind", address, *_LIGHTHOUSE], log=self.folder / "lighthouse.log"
        )
        try:
            yield
        finally:
            for name in list(self._replicas):
                self.node_went(name)
            lighthouse.kill()
            lighthouse.wait()

    def read(self) -> tuple[list[Step], list[Mark]]:
        log = Path(peer_settings(self)["log"])
        _, marks = read_log(log)
        return together(read_lines(log), step_s=BATCH // MAX_NODES * self.settings.row_s), marks

    def node_came(self, name: str) -> None:
        taken = {group for group, _ in self._replicas.values()}
        group = min(set(range(MAX_NODES)) - taken)
        self._start(name, group)

    def node_warned(self, name: str, deadline_s: float) -> None:
        self._replicas[name][1].send_signal(signal.SIGTERM)  # leave after this step

    def node_went(self, name: str) -> None:
        _, replica = self._replicas.pop(name)
        replica.kill()
        replica.wait()

    def tick(self) -> None:
        """Starts again what ended on a node that stays, as a scheduler does."""
        for name, (group, replica) in list(self._replicas.items()):
            if replica.poll() not in (None, 0):
                self._start(name, group)

    def _start(self, name: str, group: int) -> None:
        settings = peer_settings(self) | {"group": group, "max_nodes": MAX_NODES}
        module = "tests.benchmarks.goodput.contenders.torchft_replica"
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "TORCHFT_LIGHTHOUSE": self._address,
        }
        replica = start_bound(
            [str(python()), "-m", module, json.dumps(settings)],
            log=self.folder / f"replica-{group}.log",
            environment=environment,
        )
        self._replicas[name] = group, replica


def together(lines: list[dict[str, Any]], *, step_s: float) -> list[Step]:
    """Returns the steps of all replicas' lines, which are by time: a replica's line belongs to the
    step of that number that others have just completed."""
    steps: list[Step] = []
    for line in lines:
        if "step" not in line:
            continue
        samples, last = tuple(line["samples"]), steps[-1] if steps else None
        if last and last.number == line["step"] and line["time"] - last.time_s < step_s:
            samples += last.samples
            steps.pop()
        steps.append(Step(line["time"], line["step"], line["world_size"], samples, line["weights"]))
    return steps
