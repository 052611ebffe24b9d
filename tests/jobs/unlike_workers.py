"""Trains with two workers that round differently, each in a process of its own on a node of its own
name."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cluster.local.local_cluster import NODE_NAME_VARIABLE
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from tests.jobs.worker_processes import exit_code, into_log, worker_process


def with_scaling(plan: RunPlan, **changed: Any) -> RunPlan:
    scaling = plan.config.scaling.model_copy(update=changed)
    return replace(plan, config=plan.config.model_copy(update={"scaling": scaling}))


def train_unlike_workers(plan: RunPlan, folder: Path) -> Ledger:
    """Trains to the end. The workers have one and two threads, for which products are cut in other
    places."""
    plans = [with_scaling(plan, threads_per_worker=threads) for threads in (1, 2)]
    meeting, log = tempfile.mktemp(dir=folder), folder / "log"
    processes = [
        worker_process(_train, plan, rank, meeting, log) for rank, plan in enumerate(plans)
    ]
    for process in processes:
        process.start()
    assert [exit_code(process) for process in processes] == [0, 0], log.read_text()
    return Ledger.read(plan.run)


def _train(plan: RunPlan, rank: int, meeting: str, log: Path) -> None:
    into_log(log)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", NODE_NAME_VARIABLE: f"node-{rank}"}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    train(plan, rank=rank, world_size=2)
