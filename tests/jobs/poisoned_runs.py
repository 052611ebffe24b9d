"""Real training in processes of their own, whose loss turns to NaN at chosen lanes, or that die at
a chosen step."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from jobs.exact.lane_passes import LanePasses
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from raymill.step_timer import StepTimer
from tests.jobs.worker_processes import worker_process
from tests.time_limits import limit_s


@dataclass(frozen=True)
class Faults:
    # (step, lane): the loss there is NaN, and so is its gradient
    poisoned: frozenset[tuple[int, int]] = frozenset()
    # (step, factor): the loss of the whole step is so many times larger
    scaled: tuple[tuple[int, float], ...] = ()
    dies_at: int | None = None  # the step in whose middle the process ends, as by SIGKILL


def run_world(plan: RunPlan, faults: Faults = Faults(), *, world_size: int = 1) -> None:
    """Trains the plan, with one process for each rank, to its end or to the fault's."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        processes = [
            worker_process(_work, plan, faults, rank, world_size, meeting)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(limit_s(60))
        codes: Sequence[int | None] = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    expected = 0 if faults.dies_at is None else 137
    assert codes == [expected] * world_size, codes


def _work(plan: RunPlan, faults: Faults, rank: int, world_size: int, meeting: str) -> None:
    take = LanePasses.take

    def faulty(self: LanePasses, step: int, lane: int, timer: StepTimer, **options: Any) -> Tensor:
        if step == faults.dies_at:
            os._exit(137)
        scale = options.pop("scale", 1.0) * dict(faults.scaled).get(step, 1.0)
        if (step, lane) in faults.poisoned:
            scale = float("nan")
        return take(self, step, lane, timer, scale=scale, **options)

    LanePasses.take = faulty  # type: ignore[method-assign, assignment]
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
        )
    train(plan, rank=rank, world_size=world_size)
    if world_size > 1:
        dist.destroy_process_group()
