"""A GPU that never ends its kernel holds the others up, and is told from one that waits in a
message."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raymill.workers.progress import Progress
from tests.waiting import wait_until

pytestmark = pytest.mark.gpu
_HALF_A_SECOND = 1 << 30  # clock cycles


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch finds no CUDA device on this machine"
)
def test_marks_count_once_the_stream_has_come_to_them() -> None:
    device, progress = torch.device("cuda", 0), Progress()
    torch.cuda._sleep(_HALF_A_SECOND)  # its own work
    with progress.message(range(2), device):
        torch.cuda._sleep(_HALF_A_SECOND)  # stands for the message
    progress.end_pass(device)
    assert not progress.is_in_message(on_gpu=True)
    assert progress.num_marks() == 0
    wait_until(lambda: progress.is_in_message(on_gpu=True), poll_s=0.01)
    assert progress.messages() == {"0:2:1": (1, 0)}
    torch.cuda.synchronize()
    assert not progress.is_in_message(on_gpu=True)
    assert progress.messages() == {"0:2:1": (1, 1)}
    assert progress.num_marks() == 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank")
@pytest.mark.parametrize("shard", ["none", "parameters"])
def test_a_worker_whose_gpu_is_stuck_is_ended_alone(tmp_path: Path, shard: str) -> None:
    pytest.importorskip("ray")  # which the other tests of this folder do without
    from jobs.run.ledger import Ledger
    from tests.jobs.hanging_runs import Fault, run_with
    from tests.jobs.runs import tiny_plan

    settings: dict[str, Any] = {
        "train": {
            "micro_batch_size": 1,
            "eval_every_steps": 8,
            "precision": "bf16",
            "compute": "plain",
        },
        "checkpoint": {"save_every_steps": 2, "num_to_keep": 9},
        "scaling": {"max_workers": 2, "use_gpu": True, "shard": shard, "hang_timeout_s": 5.0},
    }
    hashes = []
    for name, fault in (("undisturbed", Fault(())), ("stuck", Fault((1,), kernel_after_step=5))):
        (tmp_path / name).mkdir()
        plan = tiny_plan(str(tmp_path / name), **settings)
        logs, replaced = run_with(fault, plan, tmp_path / name, world_size=2)
        ledger = Ledger.read(plan.run)
        hashes.append(ledger.events("checkpoint")[-1]["parameter_hash"])
    assert replaced == [1]
    assert len({line for line in logs[0] if line.startswith("met ")}) == 1
    (hang,) = ledger.events("hang")
    assert (hang["rank"], hang["health"]) == (1, "stuck")
    assert hashes[0] == hashes[1]
