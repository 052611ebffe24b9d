"""Workers and nodes are killed, and nodes join: at most one step is repeated, and the bits stay the
same.

Each node holds one worker, and disturbed steps are long enough for a snapshot each. One local
cluster serves the module.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.commands.chaos import chaos, parse_faults
from cluster.settings.run import ClusterConfig, RunConfig
from cluster.stages.stage import Connection, connected, run_stage
from jobs.run.ledger import Ledger
from tests.e2e.tiny_runs import ledger_of, losses, tiny_run
from tests.jobs.corpora import number_texts
from tests.paced_steps import Pace, paced
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_STEPS = 160
STEP_S = 0.1


@pytest.fixture(scope="module")
def pace(folder: Path) -> Iterator[Pace]:
    with paced(folder) as pace:
        yield pace


@pytest.fixture(scope="module")
def connection(pace: Pace) -> Iterator[Connection]:
    with connected(ClusterConfig(num_nodes=3), cpus_per_node=1) as connection:
        yield connection


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    number_texts(folder / "corpus")
    return folder


def run_config(folder: Path, run_id: str, **scaling: Any) -> RunConfig:
    return tiny_run(
        folder,
        run_id,
        num_steps=NUM_STEPS,
        eval_every_steps=30,
        save_every_steps=25,
        batch_size=8,
        lane_size=2,
        dropout=0.1,
        **scaling,
    )


def run(
    connection: Connection, config: RunConfig, *faults: str
) -> tuple[dict[str, Any], list[float], Ledger]:
    with chaos(parse_faults(faults), cluster=connection.local, config=config):
        result = run_stage(connection, "jobs.pretrain", config)
    # Ray ends a finished job's processes soon, not at once.
    wait_until(lambda: not memory_left(), timeout_s=30, why=memory_left)
    return result, losses(config), ledger_of(config)


def memory_left() -> list[str]:
    """Returns open or named memory of snapshots on this machine."""
    left = [str(path) for path in Path("/dev/shm").iterdir() if "raymill" in path.name]
    for process in psutil.process_iter():
        try:
            links = [entry.readlink() for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:  # of another user, or gone
            continue
        left += [
            f"process {process.pid}: {link}" for link in links if "memfd:raymill-" in str(link)
        ]
    return left


@pytest.fixture(scope="module")
def undisturbed(connection: Connection, folder: Path) -> tuple[str, list[float]]:
    result, losses_of_run, ledger = run(
        connection, run_config(folder, "undisturbed", min_workers=2, max_workers=2)
    )
    assert [start["from_memory"] for start in ledger.events("start")] == [False]
    return result["parameter_hash"], losses_of_run


def test_the_only_worker_is_killed(
    connection: Connection, folder: Path, pace: Pace, undisturbed: tuple[str, list[float]]
) -> None:
    config = run_config(folder, "alone", min_workers=1, max_workers=1)
    with pace.slow(STEP_S):
        result, losses_of_run, ledger = run(connection, config, "kill-worker@12", "kill-worker@40")
    assert [start["from_memory"] for start in ledger.events("start")] == [False, True, True]
    assert max(recovery.lost_steps for recovery in ledger.recoveries()) <= 1
    assert (result["parameter_hash"], losses_of_run) == undisturbed


def test_a_sharded_state_survives_a_worker(
    connection: Connection, folder: Path, pace: Pace, undisturbed: tuple[str, list[float]]
) -> None:
    config = run_config(folder, "sharded", shard="parameters", min_workers=2, max_workers=2)
    with pace.slow(STEP_S):
        result, losses_of_run, ledger = run(connection, config, "kill-worker@12")
    assert [start["from_memory"] for start in ledger.events("start")] == [False, True]
    assert max(recovery.lost_steps for recovery in ledger.recoveries()) <= 1
    assert (result["parameter_hash"], losses_of_run) == undisturbed
    shards = Path(ledger.events("checkpoint")[-1]["checkpoint"]).glob("model-shard-*")
    assert len([*shards]) == 2, "each worker stored its own"


def test_a_worker_and_a_node_are_killed_and_a_node_joins(
    connection: Connection, folder: Path, pace: Pace, undisturbed: tuple[str, list[float]]
) -> None:
    config = run_config(folder, "disturbed", min_workers=1, max_workers=2, resize_check_s=1)
    with pace.slow(2 * STEP_S):  # the node that joins has half a minute
        result, losses_of_run, ledger = run(
            connection, config, "kill-worker@8", "kill-node@20", "add-node@28"
        )
    starts = ledger.events("start")
    assert [start["from_memory"] for start in starts] == [False] + [True] * (len(starts) - 1)
    assert result["world_sizes"][:3] == [2, 2, 1]
    assert result["world_sizes"][-1] == 2, "the run did not grow back"
    assert max(recovery.lost_steps for recovery in ledger.recoveries()) <= 1
    assert (result["parameter_hash"], losses_of_run) == undisturbed
