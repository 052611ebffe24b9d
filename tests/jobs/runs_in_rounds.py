"""Real training in processes that meet by a store, one of whose gathers ends as an abort of NCCL's
leaves it.

Writes into a rank's log what it kept and what it rescued: the step, and the hash of the weights
then; and as an attempt begins, after how many watched ones, and what of these is alive.
"""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.snapshots.snapshots import Snapshots
from jobs.training import train_loop
from jobs.training.train_loop import train
from jobs.workers.heartbeat import Pulse
from jobs.workers.rendezvous import Rendezvous, meeting_place
from model.files.failpoints import VARIABLE
from raymill.files.safetensors_file import parameter_hash
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import Meeting
from tests.jobs.attempt_witness import AttemptWitness
from tests.jobs.worker_processes import exit_code, into_log, worker_process
from tests.waiting import wait_until


@dataclass(frozen=True)
class CutOff:
    """What befalls a rank at a gather of a step, the first or a later one.

    It finds no table (`zeros`), the one of the step before (`stale`), that of another round
    (`round`), or the whole table, after its watcher began to abort (`aborted`). Or it is killed
    before (`killed`), as soon as the run has a checkpoint of the step `saved`, where that is given.
    Or it dies at a failpoint, whatever the step: `how` is then what the variable says.
    """

    rank: int
    step: int
    how: str
    number: int = 0
    saved: int = 0


def run_in_rounds(
    plan: RunPlan, folder: Path, cut_offs: Sequence[CutOff], *, world_size: int = 2
) -> list[list[str]]:
    """Trains the plan to its end, and starts again a rank that was killed. Returns the lines of
    each rank's log."""
    logs = [folder / f"{rank}.log" for rank in range(world_size)]

    def start(rank: int, cut_offs: Sequence[CutOff]) -> BaseProcess:
        process = worker_process(
            _train_in_rounds, plan, address, rank, world_size, logs[rank], cut_offs
        )
        process.start()
        return process

    with meeting_place("127.0.0.1") as address:
        processes = [start(rank, cut_offs) for rank in range(world_size)]
        for cut in cut_offs:
            if cut.how == "killed" or ":" in cut.how:
                assert exit_code(processes[cut.rank]) == (
                    -signal.SIGKILL if cut.how == "killed" else 137
                )
                processes[cut.rank] = start(cut.rank, ())
        assert {exit_code(process) for process in processes} == {0}, [
            log.read_text() for log in logs
        ]
    return [log.read_text().splitlines() for log in logs]


def _is_saved(plan: RunPlan, step: int) -> bool:
    """Tells whether the run has a checkpoint of a step; none is needed of step 0."""
    saved = {event["step"] for event in Ledger.read(plan.run).events("checkpoint")}
    return not step or step in saved


def _train_in_rounds(
    plan: RunPlan, address: str, rank: int, world_size: int, log: Path, cut_offs: Sequence[CutOff]
) -> None:
    into_log(log)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for cut in cut_offs:
        if cut.rank == rank and ":" in cut.how:
            os.environ[VARIABLE] = cut.how
    use_gpu = plan.config.scaling.use_gpu
    if use_gpu:
        torch.cuda.set_device(rank)
    pulse = Pulse({})
    rendezvous = Rendezvous(
        address,
        group="group",
        seat=rank,
        num_seats=world_size,
        use_gpu=use_gpu,
        progress=lambda: pulse.num_steps,
    )
    to_come = {(cut.step, cut.number): cut for cut in cut_offs if cut.rank == rank}
    gather, tables = dist.all_gather_single, dict[torch.Size, Tensor]()
    meetings: list[Meeting] = []
    last = [0, 0]

    def cut_off(table: Tensor, own: Tensor) -> Any:
        last[:] = [int(own[-1]), last[1] + 1 if int(own[-1]) == last[0] else 0]
        cut = to_come.pop((last[0], last[1]), None)
        how = cut.how if cut else None
        if cut and how == "killed":
            wait_until(lambda: _is_saved(plan, cut.saved))
            os.kill(os.getpid(), signal.SIGKILL)
        before, done = table.clone(), gather(table, own)
        match how:
            case "zeros":
                table.copy_(before)
            case "stale":
                table.copy_(tables[table.shape])
            case "round":
                table[-2] += 1
            case "aborted":
                meetings[-1].aborted.set()
        tables[table.shape] = table.clone()
        return done

    def told(what: str, step: int, state: TrainState) -> None:
        own = parameter_hash({"own": state.values})
        os.write(1, f"{what} {step} {own}\n".encode())

    def after_step(self: Snapshots, step: int, state: TrainState, **more: Any) -> None:
        self.last = step  # type: ignore[attr-defined]
        told("kept", step, state)

    def rescue(self: Snapshots, state: TrainState) -> None:
        told("rescued", getattr(self, "last", 0), state)

    witness, begin = AttemptWitness(), train_loop.open_attempt

    def watched(*arguments: Any, **options: Any) -> Any:
        os.write(1, f"alive {witness.num_watched} {json.dumps(witness.alive())}\n".encode())
        return begin(*arguments, **options)

    train_loop.open_attempt = watched
    dist.all_gather_single = cut_off
    Snapshots.after_step, Snapshots.rescue = after_step, rescue  # type: ignore[method-assign, assignment]

    def work(meeting: Meeting) -> None:
        meetings.append(meeting)
        last[:] = [0, 0]
        os.write(1, f"met {os.getpid()}\n".encode())
        train(plan, rank=rank, world_size=world_size, meeting=meeting, pulse=pulse)

    while not rendezvous.attend(work):
        pass
