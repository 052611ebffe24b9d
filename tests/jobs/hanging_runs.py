"""Real training in processes that meet by a store, each with its watchdog, where a fault lets all
of them hang.

Writes into a rank's log when it met the others, and when it rescued its state. A rank that was
ended is started again.
"""

import os
import signal
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from jobs.run.run_plan import RunPlan
from jobs.snapshots.snapshots import Snapshots
from jobs.training.train_loop import train
from jobs.training.train_worker import WAITING_PLACES
from jobs.workers.heartbeat import watched
from jobs.workers.rendezvous import Rendezvous, meeting_place
from jobs.workers.watchdog import Waits
from model.files.failpoints import VARIABLE
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import Meeting
from tests.jobs.stopped_links import stop_between
from tests.jobs.worker_processes import into_log, worker_process
from tests.waiting import wait_until

_STOPPED = "link-stopped"


@dataclass(frozen=True)
class Fault:
    """What befalls the ranks once: at a failpoint, or after a step their link, or a kernel that
    never ends."""

    ranks: tuple[int, ...]
    failpoint: str = ""
    link_after_step: int = 0
    kernel_after_step: int = 0


def run_with(
    fault: Fault, plan: RunPlan, folder: Path, *, world_size: int
) -> tuple[list[list[str]], list[int]]:
    """Trains the plan to its end. Returns the lines of each rank's log, and the ranks that were
    started again."""
    logs = [folder / f"{rank}.log" for rank in range(world_size)]
    replaced: list[int] = []

    def start(rank: int, fault: Fault | None) -> BaseProcess:
        process = worker_process(_train, plan, address, rank, world_size, folder, fault)
        process.start()
        return process

    def are_done() -> bool:
        pausing = [
            rank
            for rank in fault.ranks
            if logs[rank].exists() and "pauses" in logs[rank].read_text()
        ]
        if len(pausing) == 2 and not (folder / _STOPPED).exists():
            first, second = (processes[rank].pid for rank in pausing)
            assert first is not None and second is not None, "both are started"
            assert stop_between(first, second), "they have no connection"
            (folder / _STOPPED).touch()
        for rank, process in enumerate(processes):
            if process.exitcode in (1, -signal.SIGKILL):
                replaced.append(rank)
                processes[rank] = start(rank, None)
        return all(process.exitcode == 0 for process in processes)

    with meeting_place("127.0.0.1") as address:
        processes = [start(rank, fault) for rank in range(world_size)]
        try:
            wait_until(
                are_done, timeout_s=40, why=lambda: [log.read_text()[-2000:] for log in logs]
            )
        finally:
            for process in processes:
                process.kill()
    return [log.read_text().splitlines() for log in logs], replaced


def _train(
    plan: RunPlan, address: str, rank: int, world_size: int, folder: Path, fault: Fault | None
) -> None:
    into_log(folder / f"{rank}.log")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    is_struck = fault is not None and rank in fault.ranks
    if fault is not None and is_struck and fault.failpoint:
        os.environ[VARIABLE] = fault.failpoint
    pause_after = {fault.link_after_step} if fault is not None and is_struck else set()
    stuck_after = {fault.kernel_after_step} if fault is not None and is_struck else set()
    if plan.config.scaling.use_gpu:
        torch.cuda.set_device(rank)
    timeout_s = plan.config.scaling.hang_timeout_s

    def tell(*words: object) -> None:
        os.write(1, f"{' '.join(map(str, words))}\n".encode())

    def after_step(self: Snapshots, step: int, state: TrainState, **more: Any) -> None:
        if step in stuck_after:
            torch.cuda._sleep(1 << 62)  # clock cycles
        if step in pause_after:
            pause_after.clear()
            tell("pauses")
            wait_until((folder / _STOPPED).exists, poll_s=0.01)

    def rescue(self: Snapshots, state: TrainState) -> None:
        tell("rescued")

    Snapshots.after_step, Snapshots.rescue = after_step, rescue  # type: ignore[method-assign, assignment]

    def work(meeting: Meeting) -> None:
        tell("met", os.getpid())
        train(plan, rank=rank, world_size=world_size, meeting=meeting, pulse=pulse)

    with watched(
        plan.run.uri, rank=rank, hang_timeout_s=timeout_s, waiting_places=WAITING_PLACES
    ) as pulse:
        rendezvous = Rendezvous(
            address,
            group="group",
            seat=rank,
            num_seats=world_size,
            use_gpu=plan.config.scaling.use_gpu,
            is_waiting=lambda: Waits.WORKERS in pulse.beat().waits_for,
            progress=lambda: pulse.num_steps,
            pulse=pulse,
            hang_timeout_s=timeout_s,
        )
        while not rendezvous.attend(work):
            pass
