"""A worker's entry: a group that can never start ends the run with the reason in its ledger."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from jobs.run.ledger import Ledger
from jobs.training import train_worker as entry
from jobs.workers.failures import Kind
from jobs.workers.incident_notes import note
from jobs.workers.rendezvous import meeting_place
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.runs import tiny_plan

NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL version 2.28\nncclSystemError: System call "
    "failed.\nLast error:\nError while creating shared memory segment /dev/shm/nccl-abc (size 9637888)"
)


@pytest.mark.more
def test_a_group_that_can_never_start_gives_up_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first message fails, before an attempt has a line in the ledger."""
    plan = tiny_plan(
        str(tmp_path), scaling={"max_workers": 1, "max_fruitless_attempts": 3, "hang_timeout_s": 0}
    )
    note(plan.run, "failure", rank=0, kind=Kind.DIED, reason="an earlier one")
    num_messages = 0

    def broadcast(group: WorkerGroup, value: Any) -> Any:
        nonlocal num_messages
        num_messages += 1
        raise dist.DistBackendError(NCCL)

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(entry.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(entry, "group_name", lambda: "group")
    monkeypatch.setattr(WorkerGroup, "broadcast", broadcast)
    with meeting_place("127.0.0.1") as address:
        entry.train_worker(plan, address=address, sizes=[1])
    assert num_messages == 3
    lines = Ledger.read(plan.run).lines
    assert [line["event"] for line in lines] == ["failure", "gave_up"]
    assert lines[-1]["reason"] == (
        "the workers met 3 times in a row and completed no step; the last time: Error while creating shared memory "
        "segment /dev/shm/nccl-abc (size 9637888)"
    )
