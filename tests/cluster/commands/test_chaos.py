"""Faults on purpose: how they are written down, and that the ledger decides when and whom they
hit."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.commands.chaos import Fault, FaultKind, chaos, parse_faults
from cluster.local.local_cluster import LocalCluster
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, StorageConfig
from cluster.storage.uris import open_storage
from jobs.run.ledger import LedgerWriter
from tests.time_limits import limit_s


def test_faults_come_in_the_order_of_their_steps() -> None:
    assert parse_faults([]) == []
    assert parse_faults(["add-node@60", "kill-worker@5", "kill-node@40"]) == [
        Fault(FaultKind.KILL_WORKER, 5),
        Fault(FaultKind.KILL_NODE, 40),
        Fault(FaultKind.ADD_NODE, 60),
    ]


@pytest.mark.parametrize(
    "word", ["", "kill-node", "kill-node@", "kill-node@x", "kill-node@-1", "kill@3", "@3", "3"]
)
def test_other_words_are_refused_with_the_known_ones(word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_faults(["kill-node@4", word])
    assert all(word in str(refused.value) for word in (repr(word), "FAULT@STEP", *FaultKind))


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two real processes that stand for the workers of ranks 0 and 1."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)
    ]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_the_highest_rank_is_killed_once_its_step_is_done(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    config = RunConfig(run_id="r", storage=StorageConfig(uri=str(tmp_path)))
    ledger = LedgerWriter(open_storage(str(tmp_path)).child("runs/r"))
    workers = [
        {"pid": process.pid, "node": f"node-{rank}"} for rank, process in enumerate(sleepers)
    ]
    cluster = LocalCluster(num_nodes=1, cpus_per_node=1)  # never started: its nodes are not needed
    with chaos(parse_faults(["kill-worker@2"]), cluster=cluster, config=config):
        ledger.event("start", attempt=1, world_size=2, step=0, checkpoint=None, workers=workers)
        ledger.step(step=1)
        with pytest.raises(subprocess.TimeoutExpired):  # several looks at the ledger long
            sleepers[1].wait(0.5)
        ledger.step(step=2)
        assert sleepers[1].wait(limit_s(20)) == -signal.SIGKILL
    assert sleepers[0].poll() is None
    cluster.stop()
