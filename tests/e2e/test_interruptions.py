"""Hangs, stragglers and SIGTERM do not end a run, and a failure that repeats ends it with its
reason.

Everything is real: raylets, Ray Train, signals. One local cluster serves the whole module.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.settings.run import ClusterConfig, RunConfig, write_config
from cluster.stages.stage import Connection, connected, run_stage
from cluster.stages.stage_module import OverBudgetError, StageFailedError
from cluster.storage.registry import publications
from cluster.storage.uris import open_storage
from jobs.run.ledger import Ledger
from tests.e2e.tiny_runs import ledger_of, losses, tiny_run
from tests.jobs.corpora import number_texts
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_STEPS = 400


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    with connected(ClusterConfig(num_nodes=2), cpus_per_node=3) as connection:
        yield connection


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the corpus and the storage."""
    folder = tmp_path_factory.mktemp("interruptions")
    number_texts(folder / "corpus")
    return folder


def run_config(folder: Path, run_id: str, **scaling: Any) -> RunConfig:
    scaling = {"min_workers": 2, "max_workers": 2} | scaling
    return tiny_run(folder, run_id, num_steps=NUM_STEPS, save_every_steps=100, **scaling)


@pytest.fixture(scope="module")
def alone(connection: Connection, folder: Path) -> tuple[str, list[float]]:
    """The parameter hash and the loss column of an undisturbed run."""
    config = run_config(folder, "alone", min_workers=1, max_workers=1)
    return run_stage(connection, "jobs.pretrain", config)["parameter_hash"], losses(config)


class Running:
    """A run in the background, whose workers can be sent signals."""

    def __init__(self, connection: Connection, config: RunConfig) -> None:
        self._config, self._threads = config, ThreadPoolExecutor(max_workers=1)
        self.result: Future[dict[str, Any]] = self._threads.submit(
            run_stage, connection, "jobs.pretrain", config
        )

    def until(self, condition: Callable[[Ledger], object], timeout_s: float = 90) -> Ledger:
        def comes_true() -> object:
            assert not self.result.done() or condition(ledger_of(self._config)), (
                self.result.result()
            )
            return condition(ledger_of(self._config))

        wait_until(comes_true, timeout_s=timeout_s, why=lambda: ledger_of(self._config).events())
        return ledger_of(self._config)

    def worker(self, rank: int) -> int:
        return int(ledger_of(self._config).events("start")[-1]["workers"][rank]["pid"])


def at_step(step: int) -> Callable[[Ledger], object]:
    return lambda ledger: ledger.steps and ledger.steps[-1]["step"] >= step


def test_a_stopped_worker_is_named_killed_and_replaced(
    connection: Connection, folder: Path, alone: tuple[str, list[float]]
) -> None:
    config = run_config(folder, "hang")
    run = Running(connection, config)
    run.until(at_step(30))
    os.kill(run.worker(1), signal.SIGSTOP)
    result = run.result.result(limit_s(150))
    ledger = ledger_of(config)
    (hang,) = ledger.events("hang")
    assert (hang["rank"], hang["health"]) == (1, "silent")
    assert [line["kind"] for line in ledger.events("failure")] == ["died"]
    (recovery,) = ledger.recoveries()
    print(
        f"from the last step before the hang to the first after it: {recovery.seconds} s, steps lost: {recovery.lost_steps}"
    )
    assert recovery.seconds <= limit_s(45)
    (kept,) = (folder / "storage/runs/hang/hangs").iterdir()
    assert kept.name.endswith("-rank-1-silent.txt")
    assert (result["parameter_hash"], losses(config)) == alone


def test_sigterm_makes_a_checkpoint_and_a_straggler_no_restart(
    connection: Connection, folder: Path, alone: tuple[str, list[float]]
) -> None:
    hang_timeout_s = limit_s(1.25)
    config = run_config(folder, "term", hang_timeout_s=hang_timeout_s)
    run = Running(connection, config)
    run.until(at_step(20))
    worker = run.worker(1)
    os.kill(worker, signal.SIGTERM)
    sent_at = time.time()
    ledger = run.until(lambda ledger: ledger.events("checkpoint"))
    saved = ledger.events("checkpoint")[0]
    print(f"SIGTERM to checkpoint: {saved['time'] - sent_at:.2f} s")
    assert 20 <= saved["step"] < 100
    os.kill(worker, signal.SIGTERM)
    run.until(lambda ledger: len(ledger.events("preempted")) > 1)
    for _ in range(math.ceil(1.4 * hang_timeout_s / 0.9)):  # longer than the timeout
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.9)
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.1)
        if run.result.done():
            break
    assert run.result.result(limit_s(120))["restarts"] == 0
    assert ledger_of(config).events("hang") == []
    assert ledger_of(config).events("preempted")[0]["step"] == saved["step"]
    assert losses(config) == alone[1]


def test_sigterm_to_the_launcher_leaves_its_last_step(
    connection: Connection, folder: Path, alone: tuple[str, list[float]]
) -> None:
    config = run_config(folder, "launcher")
    write_config(config, folder / "run.yaml")
    command = [sys.executable, "-m", "cluster.cli", "pretrain", str(folder / "run.yaml")]
    assert connection.local is not None
    environment = os.environ | connection.local.environment
    launcher = subprocess.Popen(
        [*command, "--cluster.address", connection.api.url], env=environment
    )
    try:
        wait_until(
            lambda: launcher.poll() is not None or at_step(30)(ledger_of(config)), timeout_s=90
        )
        assert launcher.poll() is None
        launcher.terminate()
        sent_at = time.monotonic()
        assert launcher.wait(limit_s(60)) == 128 + signal.SIGTERM
    finally:
        launcher.kill()
    ledger = ledger_of(config)
    last = ledger.steps[-1]["step"]
    print(f"SIGTERM to the launcher's end: {time.monotonic() - sent_at:.1f} s, after step {last}")
    assert last < NUM_STEPS
    assert [(line["step"], line["notice"]) for line in ledger.events("preempted")] == [
        (last, "stop")
    ]
    assert ledger.events("checkpoint")[-1]["step"] == last
    result = run_stage(connection, "jobs.pretrain", config)
    assert (result["parameter_hash"], losses(config)) == alone


def test_a_budget_ends_the_run_published__and_a_higher_one_continues_it(
    connection: Connection, folder: Path, alone: tuple[str, list[float]]
) -> None:
    """The second launch is refused before it starts a worker."""
    money = {"price_per_device_hour": 3600.0}
    config = run_config(folder, "budget", max_cost=1e-6, **money)
    for _ in range(2):
        with pytest.raises(OverBudgetError, match=r"has cost .*scaling\.max_cost=1e-06 allows"):
            run_stage(connection, "jobs.pretrain", config)
    ledger = ledger_of(config)
    assert (len(ledger.world_sizes), [line["step"] for line in ledger.steps]) == (1, [1])
    assert ledger.steps[0]["cost"] > 0 and ledger.events("spent")[0]["step"] == 1
    published = publications(open_storage(config.storage.uri))[-1]
    assert published.checkpoint == ledger.events("checkpoint")[-1]["checkpoint"]
    result = run_stage(
        connection, "jobs.pretrain", run_config(folder, "budget", max_cost=1e9, **money)
    )
    assert (result["parameter_hash"], losses(config)) == alone


def test_a_failure_that_comes_again_ends_the_run_with_its_reason(
    connection: Connection, folder: Path, alone: tuple[str, list[float]]
) -> None:
    """A shard holds ids that no model has: the second attempt fails as the first one did, and there
    is no third."""
    config = run_config(folder, "damaged")
    (shard,) = folder.glob("storage/tokens/*/shard-00000.bin")
    tokens = shard.read_bytes()
    shard.write_bytes(b"\xff" * len(tokens))
    try:
        with pytest.raises(StageFailedError) as caught:
            run_stage(connection, "jobs.pretrain", config)
    finally:
        shard.write_bytes(tokens)
    ledger = ledger_of(config)
    assert [line["kind"] for line in ledger.events("failure")] == ["raised", "raised"]
    reason = ledger.events("gave_up")[-1]["reason"]
    assert "the same error came twice" in reason
    assert "index" in reason, reason
    assert str(caught.value).startswith(f"run damaged gave up: {reason}; more is in ")
