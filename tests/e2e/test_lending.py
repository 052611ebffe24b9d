"""A run lends a worker and gets it back, and its result is that of a run that did not.

Everything is real: raylets, Ray Train, `raymill lend`, and an endpoint that borrows by itself when its load rises.
"""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.endpoint.endpoint import deploy
from cluster.local.local_cluster import free_port
from cluster.settings.run import ClusterConfig, StorageConfig, run_storage
from cluster.settings.serve import EngineConfig, ReplicaConfig, ServeConfig
from cluster.stages.stage import Connection, connected, run_stage
from cluster.storage.lending import Loan, read_loan
from cluster.storage.registry import resolve_checkpoint
from jobs.run.ledger import Ledger
from model.checkpoint import load_model
from model.tokenizer import load_tokenizer
from tests.e2e.tiny_runs import tiny_run
from tests.jobs.corpora import number_texts
from tests.serving.delivery_parts import Admin
from tests.serving.load import End, Load, greedy_asks
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SHORT, LONG = 1500, 3000  # steps; long enough for replicas to come and go
SAVE_EVERY = 500
MAX_LOST_STEPS = 4  # at a resize; a snapshot is not taken of each step where steps are this short


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    """Three places: for two workers and a replica, or a worker and two replicas."""
    with connected(ClusterConfig(num_nodes=1), cpus_per_node=3) as connection:
        yield connection


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the corpus and the storage of all runs."""
    folder = tmp_path_factory.mktemp("lending")
    number_texts(folder / "corpus")
    return folder


def parameter_hash_alone(connection: Connection, folder: Path, *, num_steps: int) -> str:
    """Returns the hash of the same run on one worker, undisturbed."""
    config = tiny_run(
        folder, f"alone-{num_steps}", num_steps=num_steps, save_every_steps=SAVE_EVERY, min_workers=1, max_workers=1
    )
    return str(run_stage(connection, "jobs.pretrain", config)["parameter_hash"])


class ElasticRun:
    """A run that trains with one worker or two, in a thread of its own."""

    def __init__(self, connection: Connection, folder: Path, run_id: str, *, num_steps: int) -> None:
        config = tiny_run(
            folder,
            run_id,
            num_steps=num_steps,
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

    @property
    def loan(self) -> Loan | None:
        return read_loan(self._storage)

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


def test_a_worker_is_lent_and_given_back_and_the_result_is_the_same(connection: Connection, folder: Path) -> None:
    storage = ["--storage.uri", str(folder / "storage")]
    expected = parameter_hash_alone(connection, folder, num_steps=SHORT)
    run = ElasticRun(connection, folder, "lender", num_steps=SHORT)
    run.wait_for_steps(world_size=2)
    assert main(["lend", "lender", "--workers", "1", "--for", "600", *storage]) == 0
    print(f"lent to 20 steps with one worker: {run.wait_for_steps(world_size=1):.1f} s")
    num_steps = len(run.ledger.steps)
    assert main(["lend", "lender", "--return", *storage]) == 0
    run.wait_for_steps(world_size=2, since=num_steps)
    run.check_result(expected)


def test_a_spike_at_the_endpoint_borrows_a_worker_and_gives_it_back(connection: Connection, folder: Path) -> None:
    expected = parameter_hash_alone(connection, folder, num_steps=LONG)
    (folder / "admin").write_text("sk-admin")
    config = ServeConfig(
        port=free_port(),
        model_name="m",
        admin_key_file=str(folder / "admin"),
        storage=StorageConfig(uri=str(folder / "storage")),
        engine=EngineConfig(max_num_seqs=2),
        replicas=ReplicaConfig(
            max_replicas=2,
            target_ongoing_requests=2,
            scale_up_after_s=1,
            scale_down_after_s=5,
            borrow_from="spiked",
        ),
    )
    endpoint = deploy(connection, config)
    checkpoint = resolve_checkpoint("latest", config.storage.uri)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    load = Load(endpoint.url, "m", greedy_asks(load_model(checkpoint), tokenizer, [[1, 2], [3]], max_tokens=20))
    admin = Admin(endpoint.url, "sk-admin")
    run = ElasticRun(connection, folder, "spiked", num_steps=LONG)

    def num_ready() -> int:
        return sum(slot["status"] == "ready" for r in admin.status()["replicas"] for slot in r["slots"].values())

    async def spike() -> float:
        """Lasts until two replicas serve, and a while longer. Returns the seconds until they did."""
        start_s = time.monotonic()
        is_over = asyncio.Event()

        async def watch() -> float:
            await asyncio.to_thread(run.wait_for_steps, world_size=1)
            await asyncio.to_thread(wait_until, lambda: num_ready() == 2, timeout_s=60)
            took_s = time.monotonic() - start_s
            await asyncio.sleep(3)
            is_over.set()
            return took_s

        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            group.create_task(load.run_clients(6, until=is_over.is_set, max_requests=50_000, seed=1))
        return watching.result()

    run.wait_for_steps(world_size=2)
    assert num_ready() == 1
    took_s = asyncio.run(spike())
    num_steps = len(run.ledger.steps)
    assert run.loan is not None and run.loan.num_workers == 1
    back_s = run.wait_for_steps(world_size=2, since=num_steps)
    counts = load.check(allowed={(False, End.DONE), (True, End.DONE)})
    print(f"two replicas after {took_s:.1f} s, two workers {back_s:.1f} s after the spike; none of {counts} failed")
    assert run.loan is None
    run.check_result(expected)
