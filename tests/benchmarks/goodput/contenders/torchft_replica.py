"""One replica of torchft's contender, after its own `train_ddp.py`. Run as `torchft_replica
SETTINGS`, a JSON object, with the lighthouse's address in TORCHFT_LIGHTHOUSE.
"""

import json
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchft import (
    DistributedDataParallel,
    DistributedSampler,
    Manager,
    Optimizer,
    ProcessGroupGloo,
)

from tests.benchmarks.goodput import peer_model
from tests.benchmarks.goodput.records import Event, write_mark, write_step

_SAMPLES = 1 << 20  # of the data set: more than a replay takes
_TIMEOUT = timedelta(seconds=30)
_MESSAGE_TIMEOUT = timedelta(seconds=5)


class Place:
    """A replica's place in its part of the data, which is stored at every step."""

    def __init__(self, file: Path, samples: Sequence[int]) -> None:
        self._file, self._samples, self._next = file, samples, 0
        with suppress(FileNotFoundError):
            self._next = int(file.read_text(encoding="ascii"))

    def take(self, count: int) -> Sequence[int]:
        first = self._next
        self._next = first + count
        part = self._file.with_suffix(".part")
        part.write_text(str(self._next), encoding="ascii")
        part.replace(self._file)
        return self._samples[first : first + count]


class MendedDdp(DistributedDataParallel):
    """torchft 0.2's, which ends the survivor's process by an assertion where gloo loses a peer: the
    future of a message that failed is not there. Here it is one of the unchanged gradient, and the
    manager, which has noted the error, does not commit the step, as torchft means it."""

    @staticmethod
    def _comm_hook(state: Manager, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        work = state.allreduce(bucket.buffer())
        if work.wait() and (future := getattr(work.get_future(), "_fut", None)):
            return future
        failed: torch.futures.Future[Tensor] = torch.futures.Future()
        failed.set_result(bucket.buffer())
        return failed


class Replica:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.group = settings, settings["group"]
        self.log, storage = Path(settings["log"]), Path(settings["storage"])
        self.model = peer_model.new_model(preset=settings["preset"], vocab=settings["vocab"])
        self.file = storage / "state.pt"
        # As torchrun gives a group of one
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=_MESSAGE_TIMEOUT),
            load_state_dict=self.load_state_dict,
            state_dict=self.state_dict,
            min_replica_size=1,
            replica_id=f"node_{self.group}",
            timeout=_TIMEOUT,
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=self._store.port,
            hostname="127.0.0.1",
        )
        loss = peer_model.Loss(self.model, row_s=settings["row_s"])
        self.loss_of = MendedDdp(self.manager, loss)
        self.inner = peer_model.new_optimizer(self.model)
        self.optimizer = Optimizer(self.manager, self.inner)
        sampler = DistributedSampler(
            range(_SAMPLES),
            replica_rank=self.group,
            num_replica_groups=settings["max_nodes"],
            group_rank=0,
            num_replicas=1,
            shuffle=False,
        )
        self.place = Place(storage / f"place-{self.group}", list(sampler))
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.load_state_dict(saved["state"])
            self.manager.load_state_dict(saved["manager"])
        write_mark(self.log, Event.LOADED)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["optimizer"])

    def rows(self, samples: Sequence[int]) -> Tensor:
        return peer_model.rows_of(
            samples, vocab=self.settings["vocab"], seq_len=self.settings["seq_len"]
        )

    def take_step(self, *, is_new: bool) -> bool:
        """Takes a step, the first one with this set of replicas if `is_new`; returns whether it was
        committed. Its rows are used up in any case."""
        samples = self.place.take(self.settings["batch"] // self.settings["max_nodes"])
        before = self.manager.current_step()
        self.optimizer.zero_grad()  # asks for a quorum, beside the passes
        if is_new:
            Thread(target=self.tell_of_quorum, daemon=True).start()
        self.loss_of(self.rows(samples)).backward()
        self.optimizer.step()
        step = self.manager.current_step()
        if step == before:
            write_mark(self.log, Event.STARTED)  # it has noticed a loss
            return False
        takes_part = self.manager.is_participating()
        is_first = self.manager.participating_rank() == 0
        is_hashed = is_first and step % self.settings["hash_every_steps"] == 0
        if takes_part:
            write_step(
                self.log,
                number=step,
                world_size=self.manager.num_participants(),
                samples=samples,
                weights=peer_model.hash_of(self.model) if is_hashed else "",
            )
        if is_first and step % self.settings["save_every_steps"] == 0:
            state = {"state": self.state_dict(), "manager": self.manager.state_dict()}
            peer_model.save(state, self.file)
        return True

    def tell_of_quorum(self) -> None:
        self.manager.wait_quorum()
        write_mark(self.log, Event.MET)


def main(settings: dict[str, Any]) -> None:
    leaving: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: leaving.append(number))
    write_mark(Path(settings["log"]), Event.STARTED)
    replica, is_new = Replica(settings), True
    while not leaving:
        is_new = not replica.take_step(is_new=is_new)
    replica.manager.shutdown(wait=False)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
