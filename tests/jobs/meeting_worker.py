"""A worker of a group that meets by a store, adds up all ranks' numbers round by round, and may be
killed.

Prints its process id when it has come and when it has met the others, and the sum of each round; a
lost worker makes all begin again.
"""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.workers.preemption import LeavingError
from jobs.workers.rendezvous import Rendezvous
from raymill.errors import LostPeerError
from raymill.workers.worker_group import Meeting
from tests.jobs.worker_processes import into_log


def tell(*words: object) -> None:
    """Prints a line in one piece, as the process may be killed between two."""
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def meet(
    address: str, rank: int, world_size: int, num_rounds: int, *, log: Path, how: str | None = None
) -> None:
    """`how` is one of the ways to work below, or None for the sound one."""
    into_log(log)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meetings: list[Meeting] = []
    rendezvous = Rendezvous(
        address,
        group="group",
        seat=rank,
        num_seats=world_size,
        is_waiting=lambda: (
            how != "balanced" and (how != "elsewhere" or not meetings[-1].aborted.is_set())
        ),
    )
    tell("come", os.getpid())

    def work(meeting: Meeting) -> None:
        tell("met", os.getpid())
        others = [other for other in range(len(rendezvous.seats)) if other != rendezvous.rank]
        for number in range(num_rounds):
            if meeting.ended.is_set():
                raise LostPeerError("the meeting is over")
            if (file := log.with_suffix(".leaves")).exists():
                raise LeavingError("leaves", gone_at_s=float(file.read_text()))
            own = torch.full((1 << 16,), float(rendezvous.rank + number))
            received = [torch.empty_like(own) for _ in others]
            sends = [dist.P2POp(dist.isend, own, other) for other in others]
            receives = [
                dist.P2POp(dist.irecv, x, other) for x, other in zip(received, others, strict=True)
            ]
            for message in dist.batch_isend_irecv(sends + receives) if others else ():
                message.wait()
            dist.all_reduce(own)
            tell("sum", number, float(own[0]))
            time.sleep(0.01)

    def deaf(meeting: Meeting) -> None:
        try:
            work(meeting)
        except RuntimeError:
            time.sleep(600)  # as a worker that waits for a message whose end it does not notice

    def broken(meeting: Meeting) -> None:
        tell("met", os.getpid())
        raise dist.DistBackendError(
            "NCCL error: unhandled system error\nno space for a segment in /dev/shm"
        )

    def elsewhere(meeting: Meeting) -> None:
        meetings.append(meeting)
        if len(meetings) > 1:
            return work(meeting)
        tell("met", os.getpid())
        # As a copy to a GPU does that is busy with a lost worker's message, until that is aborted
        meeting.aborted.wait()
        time.sleep(2)  # longer than one may stay that still waits for others
        raise LostPeerError("a step")

    # Those whose steps take equally long are not seen waiting for each other
    ways = {"deaf": deaf, "broken backend": broken, "elsewhere": elsewhere, "balanced": work}
    while not rendezvous.attend(ways[how] if how else work):
        pass
