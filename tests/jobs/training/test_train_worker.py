"""A worker's entry: a group that can never start ends the run with the reason in its ledger."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from jobs.run.ledger import Ledger
from jobs.training import train_worker as entry
from jobs.workers.failures import Kind
from jobs.workers.incident_notes import note
from jobs.workers.rendezvous import meeting_place
from tests.jobs.runs import tiny_plan

NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL version 2.28\nncclSystemError: System call "
    "failed.\nLast error:\nError while creating shared memory segment /dev/shm/nccl-abc (size 9637888)"
)


def test_a_group_that_can_never_start_gives_up_in_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan(str(tmp_path), scaling={"max_workers": 1, "max_fruitless_attempts": 3, "hang_timeout_s": 0})
    note(plan.run, "failure", rank=0, kind=Kind.DIED, reason="an earlier one")
    num_meetings = 0

    def train(*args: object, **settings: object) -> None:
        nonlocal num_meetings
        num_meetings += 1
        raise dist.DistBackendError(NCCL)

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(entry.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(entry, "get_current_placement_group", lambda: SimpleNamespace(id=b"group"))
    monkeypatch.setattr(entry, "train", train)
    with meeting_place("127.0.0.1") as address:
        entry.train_worker({"plan": plan, "address": address})
    assert num_meetings == 3
    lines = Ledger.read(plan.run).lines
    assert [line["event"] for line in lines] == ["failure", "gave_up"]
    assert lines[-1]["reason"] == (
        "the workers met 3 times in a row and completed no step; the last time: Error while creating shared memory "
        "segment /dev/shm/nccl-abc (size 9637888)"
    )
