"""The workers of an attempt as one of them sees the others: values that pass between all, and the
proof of a step.

What lies on a host travels over gloo, where a lost worker is an error. What lies on GPUs travels
over NCCL, where it is none: an aborted message returns as if it had arrived
(meta-pytorch/torchft#147). So nothing that came over it is used for good before every rank has
shown that all of its messages of the step have arrived.
"""

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raymill.errors import LostPeerError
from raymill.workers.progress import CPU, Progress


@dataclass(frozen=True)
class Meeting:
    """One round of the workers' meetings, as one of them sees it."""

    number: int = 0
    aborted: threading.Event = field(default_factory=threading.Event)
    """Set before this worker's messages are aborted."""
    ended: threading.Event = field(default_factory=threading.Event)
    """Set once the round is over: whoever is in it leaves before the next step."""
    progress: Progress = field(default_factory=Progress)
    """How far this worker is in this round."""

    def is_waiting(self) -> bool:
        """Reports whether this worker is in a message that was not aborted on its GPU, or in one on
        its host."""
        on_device = self.progress.is_in_message(on_gpu=True) and not self.aborted.is_set()
        return on_device or self.progress.is_in_message(on_gpu=False)


@dataclass(frozen=True)
class WorkerGroup:
    rank: int
    world_size: int
    meeting: Meeting = field(default_factory=Meeting, compare=False)

    def message(self, device: torch.device = CPU) -> AbstractContextManager[None]:
        """Lasts while this worker exchanges with all others, from and into the device's memory."""
        return self.meeting.progress.message(range(self.world_size), device)

    def broadcast(self, value: Any, *, source: int = 0) -> Any:
        """Returns the value of rank `source` on every rank."""
        values = [value]
        if self.world_size > 1:
            with self.message():
                dist.broadcast_object_list(values, src=source)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, in the order of ranks."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            with self.message():
                dist.all_gather_object(values, value)
        return values

    def prove(self, step: int, device: torch.device) -> None:
        """Returns once every rank has all that it was sent so far. Raises `LostPeerError`."""
        if self.world_size > 1:
            self.proven(torch.zeros(0, dtype=torch.float64, device=device), step=step, width=0)

    def proven(self, own: Tensor, *, step: int, width: int) -> Tensor:
        """Returns a table (W, width), in float64, with every rank's vector `own`, of `width` values
        at most.

        On return, all earlier messages have arrived: a rank adds its stamp only after its host has
        seen its own messages arrive, which costs a GPU the time to start a few kernels. The table
        is made of zeros, since an aborted gather leaves what lay in that memory, perhaps the table
        of the step before. Raises `LostPeerError`.
        """
        self._settle(own.device, step)
        stamp = own.new_tensor([self.meeting.number, step])
        padded = torch.cat([own, own.new_zeros(width - len(own)), stamp])
        flat = own.new_zeros(self.world_size * len(padded))
        with self.message(own.device):
            dist.all_gather_single(flat, padded)
        table = flat.view(self.world_size, -1)
        stamps = table[:, width:].tolist()
        self._settle(own.device, step)
        if missing := [
            rank for rank, found in enumerate(stamps) if found != [self.meeting.number, step]
        ]:
            ranks = ", ".join(map(str, missing))
            raise LostPeerError(
                f"step {step}: nothing shows that the messages of rank {ranks} have arrived"
            )
        return table[:, :width]

    def _settle(self, device: torch.device, step: int) -> None:
        """Waits for the messages that this worker's GPU sends and receives, and looks whether they
        were aborted."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        if self.meeting.aborted.is_set():
            raise LostPeerError(
                f"step {step}: another worker was lost, and this one's messages were aborted"
            )
