"""What befalls a whole run: outages cost it no restart, stale ranks and second launchers no bit."""

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.storage.lease import Lease, LeaseHeldError
from cluster.storage.uris import open_storage
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.run.writer_generation import Fence
from jobs.training.train_loop import train
from tests.cluster.fault_proxy import FaultProxy, running_proxy
from tests.jobs.runs import final_hash, tiny_plan
from tests.repository import REPOSITORY
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    """The hash and the losses that 300 steps end with."""
    plan = long_plan(str(tmp_path_factory.mktemp("undisturbed")))
    train(plan, rank=0, world_size=1)
    return final_hash(plan), [line["loss"] for line in Ledger.read(plan.run).steps]


def long_plan(storage_uri: str, *, tokens_in: str | None = None) -> RunPlan:
    """Of 300 steps that saves at each tenth."""
    settings = {"eval_every_steps": 100}
    return tiny_plan(
        storage_uri,
        tokens_in=tokens_in,
        num_steps=300,
        train=settings,
        checkpoint={"save_every_steps": 10},
    )


@pytest.mark.chaos
@pytest.mark.parametrize("fault", ["down", pytest.param("slow", marks=pytest.mark.slow)])
def test_a_store_out_of_reach_costs_no_restart_and_no_time(
    s3_bucket: str,
    s3_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[str, list[float]],
    fault: str,
) -> None:
    """From the first steps until long after the last one; or at 1 KB/s, with which no checkpoint
    ever arrives."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan = long_plan(f"s3://{s3_bucket}/storage", tokens_in=str(tmp_path))
    with running_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        trained = threading.Thread(target=train, args=(plan,), kwargs={"rank": 0, "world_size": 1})
        trained.start()
        wait_until(lambda: bool(RunCheckpoints(plan.run).names))
        set_fault(proxy, fault)
        ledger_file = next(tmp_path.glob("raymill-spool-*/*/ledger-*"))
        wait_until(lambda: b'"step": 300,' in ledger_file.read_bytes())
        assert trained.is_alive(), "it waits for its last checkpoint"
        set_fault(proxy, None)
        back_at_s = time.monotonic()
        trained.join(limit_s(60))
        assert not trained.is_alive()
        back_s = time.monotonic() - back_at_s
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    ledger = Ledger.read(plan.run)
    longest_s = max(line["wall_s"] for line in ledger.steps)
    print(
        f"{fault}: the run ended {back_s:.1f} s after the store's return, its longest step took {longest_s:.3f} s"
    )
    assert back_s < limit_s(30)
    assert longest_s < limit_s(1.5)
    assert len(ledger.events("start")) == 1
    assert (final_hash(plan), [line["loss"] for line in ledger.steps]) == undisturbed
    assert step_of(RunCheckpoints(plan.run).names[-1]) == 300


def set_fault(proxy: FaultProxy, fault: str | None) -> None:
    proxy.down = fault == "down"
    proxy.bytes_per_s = 1000.0 if fault == "slow" else None


@pytest.mark.chaos
@pytest.mark.more
@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_rank_that_was_stopped_and_goes_on_after_its_replacement(
    s3_bucket: str, tmp_path: Path, undisturbed: tuple[str, list[float]], kind: str
) -> None:
    uri = str(tmp_path / "storage") if kind == "local" else f"s3://{s3_bucket}/storage"
    plan = long_plan(uri, tokens_in=str(tmp_path))
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.jobs.stale_rank", str(tmp_path / "plan")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
    ) as stale:
        wait_until(lambda: bool(RunCheckpoints(plan.run).names))
        stale.send_signal(signal.SIGSTOP)
        fresh = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
        wait_until(lambda: any(name.endswith("-0002") for name in RunCheckpoints(plan.run).names))
        stale.send_signal(signal.SIGCONT)
        assert fresh.wait(limit_s(60)) == 0
        said = stale.communicate(timeout=limit_s(60))[0]
    assert re.search(r"lost: .*writer 1 was replaced by writer 2", said)
    ledger = Ledger.read(plan.run)
    generations = [line["generation"] for line in ledger.events("checkpoint")]
    assert generations == sorted(generations), "none of the old one's after the new one's start"
    assert [line["attempt"] for line in ledger.steps] == sorted(
        line["attempt"] for line in ledger.steps
    )
    attempts = [line["attempt"] for line in ledger.lines if "event" not in line]
    assert attempts == sorted(attempts)
    assert (final_hash(plan), [line["loss"] for line in ledger.steps]) == undisturbed


def test_a_second_launcher_is_refused_and_a_stale_one_s_attempts_end_quietly(
    tmp_path: Path,
) -> None:
    plan = tiny_plan(str(tmp_path))
    with (
        Lease(plan.run),
        pytest.raises(LeaseHeldError, match=r"RUNNING is held by process \d+"),
        Lease(plan.run),
    ):
        pass
    old, new = (Fence(plan.run, launcher=None).generation for _ in range(2))
    train(replace(plan, launcher=old), rank=0, world_size=1)
    assert Ledger.read(plan.run).lines == []
    train(replace(plan, launcher=new), rank=0, world_size=1)
    assert Ledger.read(plan.run).events("finish")


def test_a_killed_launcher_s_lease_is_free_at_once(tmp_path: Path) -> None:
    code = f"from cluster.storage.lease import Lease; from cluster.storage.uris import open_storage; import time\nwith Lease(open_storage({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"held\n"
        launcher.kill()
    start_s = time.monotonic()
    with Lease(open_storage(str(tmp_path)), timeout_s=limit_s(10)) as lease:
        assert lease.generation == 2
        assert time.monotonic() - start_s < limit_s(1)
