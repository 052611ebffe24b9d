"""A worker of a group that meets by a store, adds up all ranks' numbers round by round, and may be killed.

    python -m tests.jobs.meeting_worker ADDRESS RANK WORLD_SIZE ROUNDS

Prints its process id when it has come and when it has met the others, and the sum of each round; a lost worker makes all begin again.
"""

import os
import sys
import time

import torch
import torch.distributed as dist

from jobs.workers.rendezvous import Rendezvous


def main(address: str, rank: int, world_size: int, num_rounds: int) -> None:
    rendezvous = Rendezvous(address, group="group", rank=rank, world_size=world_size, backend="gloo")
    print("come", os.getpid(), flush=True)

    def work() -> None:
        print("met", os.getpid(), flush=True)
        for number in range(num_rounds):
            own = torch.full((1 << 16,), float(rank + number))
            others = [other for other in range(world_size) if other != rank]
            received = [torch.empty_like(own) for _ in others]
            sends = [dist.P2POp(dist.isend, own, other) for other in others]
            receives = [dist.P2POp(dist.irecv, x, other) for x, other in zip(received, others, strict=True)]
            for message in dist.batch_isend_irecv(sends + receives):
                message.wait()
            dist.all_reduce(own)
            print("sum", number, float(own[0]), flush=True)
            time.sleep(0.01)

    def deaf() -> None:
        try:
            work()
        except RuntimeError:
            time.sleep(600)  # as a worker that waits for a message whose end it does not notice

    def broken() -> None:
        print("met", os.getpid(), flush=True)
        raise dist.DistBackendError("NCCL error: unhandled system error\nno space for a segment in /dev/shm")

    work = broken if "BROKEN_BACKEND" in os.environ else work
    while not rendezvous.attend(deaf if "DEAF_RANK" in os.environ and rank == int(os.environ["DEAF_RANK"]) else work):
        pass


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
