"""Announces that nodes of a local cluster will be reclaimed, as a cloud's notice of preemption does.

Run as `drain ADDRESS FILE` it follows a file of lines `NODE_ID SECONDS` and runs `ray drain-node`
for each: one process for all notices, as its imports take two seconds, which a compressed notice
has not.
"""

import sys
import time
from pathlib import Path

from cluster.local.local_cluster import LocalCluster
from tests.bound_process import start_bound
from tests.local_nodes import drain_words
from tests.repository import REPOSITORY

_POLL_S = 0.05


class Drainer:
    """The process, as long as the context lasts."""

    def __init__(self, cluster: LocalCluster, *, log: Path) -> None:
        self._cluster, self._orders, self._log = cluster, log.with_suffix(".orders"), log

    def __enter__(self) -> "Drainer":
        self._orders.touch()
        environment = self._cluster.environment | {"PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "tests.benchmarks.goodput.drain"]
        command += [self._cluster.address, str(self._orders)]
        self._process = start_bound(command, log=self._log, environment=environment)
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.kill()
        self._process.wait()

    def drain(self, node_id: str, *, deadline_s: float) -> None:
        """The node goes at this UNIX time."""
        with self._orders.open("a", encoding="ascii") as orders:
            orders.write(f"{node_id} {deadline_s}\n")


def main(address: str, file: Path) -> None:
    from ray.scripts import scripts

    with file.open(encoding="ascii") as orders:
        while True:
            line = orders.readline()
            if not line:
                time.sleep(_POLL_S)
                continue
            node_id, deadline_s = line.split()
            seconds = max(1, round(float(deadline_s) - time.time()))
            try:
                words = drain_words(address, node_id, deadline_s=seconds)
                scripts.cli.main(args=words, standalone_mode=False)
            except Exception as error:  # a node that has gone already; the next notice counts
                print(f"{node_id} was not drained: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
