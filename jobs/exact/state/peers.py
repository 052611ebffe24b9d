"""Sends parts of buckets between some of the ranks, this one among them.

One call sends and receives the parts of all ranks. With 512 of them a bucket takes 1.1 ms of the host, and 0.4 ms more
where NCCL gathers equal parts. With a message for each pair of ranks each took 9 ms (where messages cost nothing): four
seconds in a step of 1.3B parameters. Ranks that are not all of them are few, and send a message for each pair.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.exact.state.flat_layout import at, part_of
from jobs.workers.failures import LostPeerError, OpenGroupError
from jobs.workers.progress import CPU, range_of
from jobs.workers.worker_group import WorkerGroup


class Peers:
    """Those of a group's ranks that are in `ranks`, in the order of their parts, this one among them."""

    def __init__(self, ranks: Sequence[int], group: WorkerGroup) -> None:
        self._ranks, self.index, self._is_world = ranks, ranks.index(group.rank), len(ranks) == group.world_size
        self._aborted, self._progress = group.meeting.aborted, group.meeting.progress
        self._range = range_of(ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def exchange(self, received: Tensor, sent: Tensor, num_received: list[int], num_sent: list[int]) -> None:
        """Sends each peer its `num_sent` values of `sent`, and receives `num_received` from each into `received`."""
        if self._is_world:
            with self._message(received.device):
                dist.all_to_all_single(received, sent, num_received, num_sent)
            return
        targets, sources = received.split(num_received), sent.split(num_sent)
        self.pass_on([(n, [values]) for n, values in enumerate(sources)], [(n, [v]) for n, v in enumerate(targets)])

    def gather(self, flat: Tensor, bucket: range) -> None:
        """Brings a bucket of a flat buffer together, from the peer that owns each part of it."""
        parts = [part_of(bucket, peer, world_size=len(self)) for peer in range(len(self))]
        own = at(flat, parts[self.index])
        if self._is_world and flat.is_cuda and len(bucket) == len(self) * len(own):
            with self._message(flat.device):
                dist.all_gather_single(at(flat, bucket), own)  # NCCL passes equal parts on from rank to rank
            return
        others = [n for n in range(len(self)) if n != self.index]
        self.pass_on([(n, [own]) for n in others], [(n, [at(flat, parts[n])]) for n in others])

    def pass_on(
        self, sent: Sequence[tuple[int, list[Tensor]]], received: Sequence[tuple[int, list[Tensor]]], *, tag: int = 0
    ) -> None:
        """Sends each peer its tensors and receives others from each, in order; what it has for itself is copied."""
        if self._aborted.is_set():
            raise LostPeerError("the messages were aborted")
        own = [dict(side).get(self.index, []) for side in (sent, received)]
        for source, target in zip(*own, strict=True):
            target.copy_(source)
        messages = [
            dist.P2POp(op, values, self._ranks[peer], tag=tag)
            for op, side in ((dist.isend, sent), (dist.irecv, received))
            for peer, tensors in side
            for values in tensors
            if peer != self.index and len(values)
        ]
        device = messages[0].tensor.device if messages else CPU
        with self._message(device):  # also without any, as the others count one
            try:
                works = dist.batch_isend_irecv(messages) if messages else []
            except RuntimeError as error:
                if device.type == "cuda":
                    raise OpenGroupError(f"a message could not begin: {error}") from error
                raise
            for work in works:
                work.wait()

    def _message(self, device: torch.device) -> AbstractContextManager[None]:
        return self._progress.message(self._range, device)
