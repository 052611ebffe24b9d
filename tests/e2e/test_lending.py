"""A run lends a worker and gets it back, and its result is that of a run that did not.

Everything is real: raylets, Ray Train, `raymill lend`. What borrows is an actor that needs the worker's place.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.config import RunConfig
from cluster.flags import validate_config
from cluster.local import LocalCluster
from cluster.stage import Connection, run_stage
from cluster.storage import open_storage
from jobs.ledger import Ledger

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_STEPS = 1500
MAX_LOST_STEPS = 4  # at a resize; a snapshot is not taken of each step where steps are this short

SETTINGS: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "data": {"vocab_size": 300, "val_fraction": 0.2},
    "train": {
        "max_tokens": NUM_STEPS * 8 * 32,
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "seq_len": 32,
        "learning_rate": 3e-3,
        "eval_every_steps": NUM_STEPS,
    },
    "checkpoint": {"save_every_steps": 500},
}


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    with LocalCluster(num_nodes=2, cpus_per_node=2) as cluster:
        yield Connection(cluster.jobs_url, {"Authorization": f"Bearer {cluster.token}"}, cluster)


def run_config(folder: Path, run_id: str, **scaling: Any) -> RunConfig:
    values = SETTINGS | {"storage": {"uri": str(folder / "storage")}, "run_id": run_id, "scaling": scaling}
    values["data"] = values["data"] | {"source": str(folder / "corpus")}
    return validate_config(values, RunConfig)


def test_a_worker_is_lent_and_given_back_and_the_result_is_the_same(connection: Connection, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(12):
        words = " ".join(str((number * 7919 + i * i) % 997) for i in range(1500))
        (tmp_path / "corpus" / f"{number:02d}.txt").write_text(words)
    alone = run_stage(connection, "jobs.pretrain", run_config(tmp_path, "alone", min_workers=1, max_workers=1))
    config = run_config(tmp_path, "lender", min_workers=1, max_workers=2, resize_check_s=2)
    storage = ["--storage.uri", config.storage.uri]

    def ledger() -> Ledger:
        return Ledger.read(open_storage(config.storage.uri).child("runs/lender"))

    def until(condition: Callable[[Ledger], object]) -> None:
        deadline = time.monotonic() + 120
        while not condition(ledger()):
            assert time.monotonic() < deadline and not running.done()
            time.sleep(0.1)

    def steps_with(world_size: int, *, since: int) -> Callable[[Ledger], object]:
        return lambda ledger: sum(line["world_size"] == world_size for line in ledger.steps[since:]) >= 20

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_stage, connection, "jobs.pretrain", config)
        until(steps_with(2, since=0))
        assert main(["lend", "lender", "--workers", "1", "--for", "600", *storage]) == 0
        lent_at = time.monotonic()
        until(steps_with(1, since=0))
        print(f"lent to 20 steps with one worker: {time.monotonic() - lent_at:.1f} s")
        num_steps = len(ledger().steps)
        assert main(["lend", "lender", "--return", *storage]) == 0
        until(steps_with(2, since=num_steps))
        result = running.result(240)
    assert result["world_sizes"] == [2, 1, 2]
    assert result["parameter_hash"] == alone["parameter_hash"]
    lost = [recovery.lost_steps for recovery in ledger().recoveries()]
    print(f"steps taken again at each resize: {lost}")
    assert len(lost) == 2 and max(lost) <= MAX_LOST_STEPS
