"""Real training in processes of their own, one of which computes or holds something wrong from a
step on. As Ray Train does, it starts the workers again without a node that was left out."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.local.local_cluster import NODE_NAME_VARIABLE
from cluster.storage.uris import open_storage
from jobs.exact.audited_gradient import AuditedGradient, AuditedStep
from jobs.exact.audits.silent_faults import corrupt
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.training.attempt import Attempt
from jobs.training.train_loop import train
from jobs.workers.left_out_nodes import left_out
from model.files.failpoints import VARIABLE
from raymill.rules.muon import Muon
from raymill.rules.update_rule import Stretch
from raymill.sums.step_totals import Measured
from tests.jobs.failpoint_runs import save_and_wait
from tests.jobs.worker_processes import exit_code, into_log, worker_process

FAULTY = "faulty"  # the name of its node
_MAX_STARTS = 4


@dataclass(frozen=True)
class Fault:
    rank: int
    failpoint: str  # as the variable says it; "matrix_update" is one of these tests alone
    from_the_start: bool = False  # in the self-test too
    from_step: int = 1  # of those that it takes, else


def run_with_fault(
    plan: RunPlan,
    folder: Path,
    fault: Fault | None,
    *,
    world_size: int,
    waits_for_checkpoints: bool = False,
    num_starts: int = _MAX_STARTS,
) -> Ledger:
    """Trains the plan to its end, or until it gives up; returns its ledger. Where a step does not
    wait for its checkpoint, a newer one may take its place on a busy machine."""
    nodes = [f"node-{rank}" for rank in range(world_size)]
    if fault:
        nodes[fault.rank] = FAULTY
    storage = open_storage(plan.config.storage.uri)
    for start in range(num_starts):
        names = {place["node"] for place in left_out(storage)}
        nodes = [node for node in nodes if node not in names]
        meeting = str(folder / f"meeting-{start}")
        processes = []
        for rank in range(len(nodes)):
            log = folder / f"{start}-{rank}.log"
            arguments = (plan, fault, rank, nodes, meeting, log, waits_for_checkpoints)
            processes.append(worker_process(work, *arguments))
        for process in processes:
            process.start()
        codes = {exit_code(process, timeout_s=120) for process in processes}
        ledger = Ledger.read(plan.run)
        if codes == {0}:
            return ledger
    raise AssertionError((folder / f"{start}-0.log").read_text())


def work(
    plan: RunPlan,
    fault: Fault | None,
    rank: int,
    nodes: list[str],
    meeting: str,
    log: Path,
    waits_for_checkpoints: bool,
) -> None:
    into_log(log)
    if waits_for_checkpoints:
        CheckpointWriter.save = save_and_wait  # type: ignore[method-assign]
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


def work_but_wait(file: Path, *arguments: Any) -> None:
    """Works, but makes a file once a step is to be computed again, and waits until that is gone."""
    audited_again = AuditedGradient.audited_again

    def after_a_while(self: AuditedGradient, *step: Any) -> AuditedStep:
        file.touch()
        while file.exists():
            time.sleep(0.05)
        return audited_again(self, *step)

    AuditedGradient.audited_again = after_a_while  # type: ignore[method-assign]
    work(*arguments)


def _arm(fault: Fault) -> None:
    update = Muon.update

    def then_wrong(self: Muon, stretches: Sequence[Stretch], *, learning_rate: float) -> None:
        update(self, stretches, learning_rate=learning_rate)
        for stretch in stretches:
            if stretch.matrix:
                corrupt("matrix_update", stretch.values)

    Muon.update = then_wrong  # type: ignore[method-assign]
    if fault.from_the_start:
        os.environ[VARIABLE] = fault.failpoint
        return
    measure = Attempt.measure

    def then_armed(self: Attempt, step: int) -> Measured | None:
        if step >= fault.from_step:
            os.environ[VARIABLE] = fault.failpoint
        return measure(self, step)

    Attempt.measure = then_armed  # type: ignore[method-assign]
