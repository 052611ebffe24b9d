"""Real training in processes of their own, one of which computes or holds something wrong from its
first step on. As Ray Train does, it starts the workers again without a node that was left out."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.local.local_cluster import NODE_NAME_VARIABLE
from cluster.storage.uris import open_storage
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training import train_loop
from jobs.training.train_loop import train
from jobs.workers.left_out_nodes import left_out
from model.files.failpoints import VARIABLE
from tests.jobs.worker_processes import exit_code, into_log, worker_process

FAULTY = "faulty"  # the name of its node
_MAX_STARTS = 4


@dataclass(frozen=True)
class Fault:
    rank: int
    failpoint: str  # as the variable says it
    from_the_start: bool = False  # in the self-test too


def run_with_fault(plan: RunPlan, folder: Path, fault: Fault | None, *, world_size: int) -> Ledger:
    """Trains the plan to its end, or until it gives up; returns its ledger."""
    nodes = [f"node-{rank}" for rank in range(world_size)]
    if fault:
        nodes[fault.rank] = FAULTY
    storage = open_storage(plan.config.storage.uri)
    for start in range(_MAX_STARTS):
        names = {place["node"] for place in left_out(storage)}
        nodes = [node for node in nodes if node not in names]
        meeting = str(folder / f"meeting-{start}")
        processes = []
        for rank in range(len(nodes)):
            log = folder / f"{start}-{rank}.log"
            processes.append(worker_process(work, plan, fault, rank, nodes, meeting, log))
        for process in processes:
            process.start()
        codes = {exit_code(process, timeout_s=120) for process in processes}
        ledger = Ledger.read(plan.run)
        if codes == {0}:
            return ledger
    raise AssertionError((folder / f"{start}-0.log").read_text())


def work(
    plan: RunPlan, fault: Fault | None, rank: int, nodes: list[str], meeting: str, log: Path
) -> None:
    into_log(log)
    torch.set_num_threads(1)
    os.environ |= {NODE_NAME_VARIABLE: nodes[rank], "GLOO_SOCKET_IFNAME": "lo"}
    if fault and nodes[rank] == FAULTY:
        _arm(fault)
    if len(nodes) > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=len(nodes)
        )
    train(plan, rank=rank, world_size=len(nodes))
    if len(nodes) > 1:
        dist.destroy_process_group()


def _arm(fault: Fault) -> None:
    if fault.from_the_start:
        os.environ[VARIABLE] = fault.failpoint
        return
    begin = train_loop.open_attempt

    def then_armed(*arguments: Any, **options: Any) -> Any:
        attempt = begin(*arguments, **options)
        os.environ[VARIABLE] = fault.failpoint
        return attempt

    train_loop.open_attempt = then_armed
