"""Real training in processes of their own, of which one cannot take its self-test. As Ray Train does,
it starts the workers again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.exact import self_test
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from jobs.workers.incident_notes import noting_user_errors
from tests.jobs.worker_processes import exit_code, into_log, worker_process


def start_twice(
    plan: RunPlan,
    folder: Path,
    *,
    error: Exception | None = None,
    environment: Mapping[str, str] | None = None,
    faulty_rank: int = 1,
) -> list[list[dict[str, Any]]]:
    """Starts the plan's two workers, and once more. Returns how each ended, by start and rank: the
    error and how often it began a self-test. That of one rank raises an error, or its environment
    is another one."""
    ends: list[list[dict[str, Any]]] = []
    for start in range(2):
        processes = []
        for rank in range(2):
            path = folder / f"{start}-{rank}"
            fault = (error, environment or {}) if rank == faulty_rank else (None, {})
            arguments = (plan, rank, str(folder / f"meeting-{start}"), path, *fault)
            processes.append(worker_process(_work, *arguments))
        for process in processes:
            process.start()
        for process in processes:
            exit_code(process, timeout_s=90)
        ends.append([json.loads((folder / f"{start}-{rank}").read_text()) for rank in range(2)])
    return ends


def _work(
    plan: RunPlan,
    rank: int,
    meeting: str,
    path: Path,
    error: Exception | None,
    environment: Mapping[str, str],
) -> None:
    into_log(path.with_suffix(".log"))
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", **environment}
    checksum, num_tests = self_test._checksum, 0

    def counted(*values: Any) -> str:
        nonlocal num_tests
        num_tests += 1
        if error:
            raise error
        return checksum(*values)

    self_test._checksum = counted  # type: ignore[assignment]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    end = ""
    try:
        with noting_user_errors(plan.run, rank=rank):
            train(plan, rank=rank, world_size=2)
    except Exception as raised:
        end = f"{type(raised).__name__}: {raised}"
    path.write_text(json.dumps({"error": end, "num_tests": num_tests}))
    dist.destroy_process_group()
