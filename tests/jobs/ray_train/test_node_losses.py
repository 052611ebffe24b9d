"""A node is lost right after a step has its line, on a real cluster: the workers that are left hand
that step's state on.

A node that is killed closes its connections within a second; one that is cut off, as by a loss of
power, closes none.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.local.local_cluster import LocalCluster
from cluster.settings.run import ClusterConfig, RunConfig, run_storage
from cluster.stages.stage import Connection, connected, run_stage
from cluster.stages.stage_module import StageFailedError
from cluster.storage.uris import StorageError
from jobs.run.ledger import Ledger, LedgerTail, Line
from jobs.workers.preemption import STOP_REQUESTED
from tests.e2e.tiny_runs import ledger_of, tiny_run
from tests.jobs.corpora import number_texts
from tests.local_nodes import drain_node, has_raylet, processes_of_node
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_NODES = 4  # that carry a worker each
SETTLED_STEPS = 12  # of an attempt, after which snapshots have their interval


class Loss(NamedTuple):
    delay_s: float  # after the line of a step
    is_cut_off: bool
    next_s: float | None = None  # after which the node of rank 2 is killed too
    comes_back: bool = False  # once the others go on: one node
    num_lost: int = 1  # 0: a node only comes
    announced_s: int | None = None  # before


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    with connected(ClusterConfig(num_nodes=NUM_NODES + 1), cpus_per_node=1) as connection:
        yield connection


class Losses(threading.Thread):
    """Loses the node of rank 1 in each of some attempts, and in the end asks the run to stop."""

    def __init__(self, config: RunConfig, cluster: LocalCluster, losses: list[Loss]) -> None:
        super().__init__(daemon=True)
        self._run, self._cluster, self._losses = run_storage(config), cluster, losses
        self._tail = LedgerTail(self._run)
        self.died_before_others_went_on: list[str] = []

    def run(self) -> None:
        try:
            self._lose_all()
        finally:
            self._run.write_bytes(STOP_REQUESTED, b"")

    def _lose_all(self) -> None:
        attempt = 0
        for loss in self._losses:
            start = self._settled(after=attempt)
            attempt = start["attempt"]
            time.sleep(loss.delay_s)
            if loss.num_lost:
                self._lose(start["workers"][1]["node"], loss, attempt)
            if loss.next_s is not None:
                time.sleep(loss.next_s)
                self._cluster.kill_node(start["workers"][2]["node"])
            if loss.comes_back:
                if loss.num_lost:
                    attempt = self._settled(after=attempt)["attempt"]
                self._cluster.add_node()
        self._settled(after=attempt)

    def _lose(self, name: str, loss: Loss, attempt: int) -> None:
        processes = processes_of_node(self._cluster, name)
        if loss.announced_s is not None:
            drain_node(self._cluster, name, deadline_s=loss.announced_s)
            self._settled(after=attempt)
            if not has_raylet(self._cluster, name):
                self.died_before_others_went_on.append(name)
        if loss.is_cut_off:
            for process in processes:
                process.suspend()
            self._settled(after=attempt)
        self._cluster.kill_node(name)
        for process in processes:
            if process.is_running():
                process.kill()

    def _settled(self, *, after: int) -> Line:
        """Returns the start of a later attempt, right after the line of one of its steps."""
        deadline_s = time.monotonic() + limit_s(60)
        while time.monotonic() < deadline_s:
            new = self._new_lines()
            starts = self._tail.ledger.events("start")
            steps = [line["step"] for line in new if "event" not in line]
            is_later = bool(starts) and starts[-1]["attempt"] > after
            if is_later and steps and steps[-1] >= starts[-1]["step"] + SETTLED_STEPS:
                return starts[-1]
            time.sleep(0.002)
        raise TimeoutError(f"no attempt after number {after} took {SETTLED_STEPS} steps")

    def _new_lines(self) -> list[Line]:
        try:
            return self._tail.read()
        except StorageError:
            return []


def lost_steps(ledger: Ledger) -> list[int]:
    """Returns how many steps each attempt but the first repeats."""
    reached: dict[int, int] = {}
    for line in ledger.lines:
        if "event" not in line:
            reached[line["attempt"]] = line["step"]
    return [reached[start["attempt"] - 1] - start["step"] for start in ledger.events("start")[1:]]


@pytest.mark.parametrize(
    ("losses", "sharding"),
    [
        ([Loss(0.0, True), Loss(0.033, False), Loss(0.1, True)], {}),
        ([Loss(0.05, True)], {"shard": "parameters", "shard_group": 2}),
        ([Loss(0.0, False)], {"shard": "gradients", "shard_group": 2}),
    ],
    ids=["whole states", "two groups that share weights", "two groups that share gradients"],
)
def test_a_lost_node_costs_no_completed_step(
    connection: Connection, tmp_path: Path, losses: list[Loss], sharding: dict[str, Any]
) -> None:
    ledger = disturbed(connection, tmp_path, losses, sharding)
    assert [start["from_memory"] for start in ledger.events("start")] == [False] + [True] * len(
        losses
    )
    assert lost_steps(ledger) == [0] * len(losses)


@pytest.mark.parametrize("next_s", [0.2, 1.5, 4.0])
def test_nodes_that_go_one_after_another__end_no_run(
    connection: Connection, tmp_path: Path, next_s: float
) -> None:
    """The second one goes while the others begin again, as spot nodes do."""
    ledger = disturbed(connection, tmp_path, [Loss(0.0, False, next_s)], {})
    assert len(ledger.events("start")) >= 2
    assert not any(lost_steps(ledger))


def test_who_is_left_goes_on_in_its_process_and_so_it_does_when_a_node_comes(
    connection: Connection, tmp_path: Path
) -> None:
    losses = [Loss(0.05, False, comes_back=True)] * 2
    starts = disturbed(connection, tmp_path, losses, {}).events("start")
    assert [start["world_size"] for start in starts] == [4, 3, 4, 3, 4]
    pids = [{worker["pid"] for worker in start["workers"]} for start in starts]
    assert pids[1] < pids[0] and pids[1] < pids[2], "the others went on, with a new one in the end"
    assert pids[3] < pids[2] and pids[3] < pids[4]


def test_a_node_is_joined_alone_where_two_were_lost(connection: Connection, tmp_path: Path) -> None:
    losses = [Loss(0.05, False, next_s=0.0, comes_back=True)]
    starts = disturbed(connection, tmp_path, losses, {}).events("start")
    sizes = [start["world_size"] for start in starts]
    assert sizes in ([4, 2, 3], [4, 3, 2, 3])
    pids = [{worker["pid"] for worker in start["workers"]} for start in starts]
    assert pids[-2] < pids[0] and pids[-2] < pids[-1], "the two that were left went on"


def test_a_run_grows_with_each_node_in_its_processes(
    connection: Connection, tmp_path: Path
) -> None:
    losses = [Loss(0.0, False, comes_back=True, num_lost=0)] * 2
    ledger = disturbed(connection, tmp_path, losses, {}, num_nodes=2)
    starts = ledger.events("start")
    assert [start["world_size"] for start in starts] == [2, 3, 4]
    pids = [{worker["pid"] for worker in start["workers"]} for start in starts]
    assert pids[0] < pids[1] < pids[2]
    assert not any(lost_steps(ledger))


def test_who_is_to_go_leaves_the_others_before_its_node_does(
    connection: Connection, tmp_path: Path
) -> None:
    """Also one that has joined them. Its node is killed once they have gone on without it."""
    losses = [Loss(0.0, False, announced_s=8, comes_back=True)] * 2
    ledger = disturbed(connection, tmp_path, losses, {})
    starts = ledger.events("start")
    assert [start["world_size"] for start in starts] == [4, 3, 4, 3, 4]
    assert starts[2]["workers"][1]["pid"] not in {worker["pid"] for worker in starts[0]["workers"]}
    assert lost_steps(ledger) == [0] * 4


def disturbed(
    connection: Connection,
    folder: Path,
    losses: list[Loss],
    sharding: dict[str, Any],
    *,
    num_nodes: int = NUM_NODES,
) -> Ledger:
    """Trains a run that loses nodes, until it is stopped after the last loss. It begins on so many
    nodes."""
    cluster = connection.local
    assert cluster is not None
    while len(cluster.node_names) > num_nodes + 1:
        cluster.kill_node(cluster.node_names[-1])
    while len(cluster.node_names) < num_nodes + 1:
        cluster.add_node()
    number_texts(folder / "corpus")
    config = tiny_run(
        folder,
        "losses",
        num_steps=100_000,
        eval_every_steps=1_000,
        save_every_steps=1_000,
        model={"n_embd": 256, "n_head": 8},
        min_workers=1,
        max_workers=NUM_NODES,
        **sharding,
    )
    thread = Losses(config, cluster, losses)
    thread.start()
    with pytest.raises(StageFailedError, match="has stopped, as requested"):
        run_stage(connection, "jobs.pretrain", config)
    thread.join()
    assert not thread.died_before_others_went_on
    return ledger_of(config)
