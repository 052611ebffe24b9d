"""A run lends a worker and gets it back, and its result is that of a run that did not.

Everything is real: raylets, Ray Train and `raymill lend`.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.settings.run import ClusterConfig, run_storage
from cluster.stages.stage import Connection, connected, run_stage
from jobs.run.ledger import Ledger
from tests.e2e.tiny_runs import tiny_run
from tests.jobs.corpora import number_texts
from tests.paced_steps import Pace, paced
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_STEPS = 600
SAVE_EVERY = 200
STEP_S = 0.25  # until the worker is back
MAX_LOST_STEPS = 1  # at a resize


@pytest.fixture(scope="module")
def pace(folder: Path) -> Iterator[Pace]:
    with paced(folder) as pace:
        yield pace


@pytest.fixture(scope="module")
def connection(pace: Pace) -> Iterator[Connection]:
    with connected(ClusterConfig(num_nodes=1), cpus_per_node=3) as connection:
        yield connection


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the corpus and the storage of all runs."""
    folder = tmp_path_factory.mktemp("lending")
    number_texts(folder / "corpus")
    return folder


def parameter_hash_alone(connection: Connection, folder: Path) -> str:
    """Returns the hash of the same run on one worker, undisturbed."""
    config = tiny_run(
        folder,
        "alone",
        num_steps=NUM_STEPS,
        save_every_steps=SAVE_EVERY,
        min_workers=1,
        max_workers=1,
    )
    return str(run_stage(connection, "jobs.pretrain", config)["parameter_hash"])


class ElasticRun:
    """A run that trains with one worker or two, in a thread of its own."""

    def __init__(self, connection: Connection, folder: Path, run_id: str) -> None:
        config = tiny_run(
            folder,
            run_id,
            num_steps=NUM_STEPS,
            save_every_steps=SAVE_EVERY,
            min_workers=1,
            max_workers=2,
            resize_check_s=2,
        )
        self._storage = run_storage(config)
        self._pool = ThreadPoolExecutor(1)
        self._running = self._pool.submit(run_stage, connection, "jobs.pretrain", config)

    @property
    def ledger(self) -> Ledger:
        return Ledger.read(self._storage)

    def wait_for_steps(self, *, world_size: int, since: int = 0) -> float:
        """Waits for 20 steps with so many workers, and returns the seconds."""

        def has_taken_them() -> bool:
            assert not self._running.done()
            return sum(line["world_size"] == world_size for line in self.ledger.steps[since:]) >= 20

        return wait_until(has_taken_them, timeout_s=120, poll_s=0.1)

    def check_result(self, parameter_hash: str) -> None:
        """Checks the run after two resizes."""
        result = self._running.result(limit_s(300))
        self._pool.shutdown()
        assert result["world_sizes"] == [2, 1, 2]
        assert result["parameter_hash"] == parameter_hash
        lost = [recovery.lost_steps for recovery in self.ledger.recoveries()]
        print(f"steps taken again at each resize: {lost}")
        assert len(lost) == 2 and max(lost) <= MAX_LOST_STEPS


def test_a_worker_is_lent_and_given_back_and_the_result_is_the_same(
    connection: Connection, folder: Path, pace: Pace
) -> None:
    storage = ["--storage.uri", str(folder / "storage")]
    expected = parameter_hash_alone(connection, folder)
    with pace.slow(STEP_S):
        run = ElasticRun(connection, folder, "lender")
        run.wait_for_steps(world_size=2)
        assert main(["lend", "lender", "--workers", "1", "--for", "600", *storage]) == 0
        print(f"lent to 20 steps with one worker: {run.wait_for_steps(world_size=1):.1f} s")
        num_steps = len(run.ledger.steps)
        assert main(["lend", "lender", "--return", *storage]) == 0
        run.wait_for_steps(world_size=2, since=num_steps)
    run.check_result(expected)
