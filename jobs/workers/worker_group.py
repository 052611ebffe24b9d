"""The workers of an attempt as one of them sees the others: plain values broadcast to all or gathered from all."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class WorkerGroup:
    rank: int
    world_size: int

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, in the order of ranks."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values
