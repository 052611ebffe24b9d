"""Sends parts of buckets between some of the ranks, this one among them.

One call sends and receives the parts of all ranks. With 512 of them a bucket takes 1.1 ms of the
host, and 0.4 ms more where NCCL gathers equal parts. With a message for each pair of ranks each
took 9 ms (where messages cost nothing): four seconds in a step of 1.3B parameters. A subset of the
ranks is small, so it sends one message per pair.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.exact.state.flat_layout import part_of, parts_of
from jobs.exact.state.span import Span
from jobs.workers.failures import LostPeerError, OpenGroupError
from jobs.workers.progress import CPU, range_of
from jobs.workers.worker_group import WorkerGroup

Tensors = tuple[int, list[Tensor]]
"""The number of a peer, and the tensors that are sent to it, or received from it, in order."""


class Peers:
    """Some ranks of a group, in the order of their parts; this one is among them."""

    def __init__(self, ranks: Sequence[int], group: WorkerGroup) -> None:
        self.index = ranks.index(group.rank)
        self._ranks = ranks
        self._is_world = len(ranks) == group.world_size
        self._aborted = group.meeting.aborted
        self._progress = group.meeting.progress
        self._range = range_of(ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def exchange(
        self,
        received: Tensor,
        sent: Tensor,
        num_received: list[int],
        num_sent: list[int],
    ) -> None:
        """Sends each peer its `num_sent` values of `sent`, and receives `num_received` from each
        into `received`."""
        if self._is_world:
            with self._message(received.device):
                dist.all_to_all_single(received, sent, num_received, num_sent)
            return
        sources = sent.split(num_sent)
        targets = received.split(num_received)
        self.pass_on(_one_each(sources), _one_each(targets))

    def gather(self, flat: Tensor, bucket: Span) -> None:
        """Brings a bucket of a flat buffer together, from the peer that owns each part of it."""
        own_part = part_of(bucket, self.index, world_size=len(self))
        own_values = own_part.of(flat)
        has_equal_parts = len(bucket) == len(self) * len(own_part)
        if self._is_world and flat.is_cuda and has_equal_parts:
            with self._message(flat.device):
                # NCCL passes equal parts on from rank to rank.
                dist.all_gather_single(bucket.of(flat), own_values)
            return
        sources: list[Tensors] = []
        targets: list[Tensors] = []
        for peer, part in enumerate(parts_of(bucket, world_size=len(self))):
            if peer != self.index:
                sources.append((peer, [own_values]))
                targets.append((peer, [part.of(flat)]))
        self.pass_on(sources, targets)

    def pass_on(
        self,
        sent: Sequence[Tensors],
        received: Sequence[Tensors],
        *,
        tag: int = 0,
    ) -> None:
        """Sends each peer its tensors and receives others from each, in order; what it has for
        itself is copied."""
        if self._aborted.is_set():
            raise LostPeerError("the messages were aborted")
        kept_sources = dict(sent).get(self.index, [])
        kept_targets = dict(received).get(self.index, [])
        for source, target in zip(kept_sources, kept_targets, strict=True):
            target.copy_(source)
        messages = self._messages(dist.isend, sent, tag)
        messages += self._messages(dist.irecv, received, tag)
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

    def _messages(
        self,
        op: Callable[..., object],
        tensors_of_peers: Sequence[Tensors],
        tag: int,
    ) -> list[dist.P2POp]:
        """Returns a message for each tensor that has values and is another peer's."""
        messages: list[dist.P2POp] = []
        for peer, tensors in tensors_of_peers:
            if peer == self.index:
                continue
            for values in tensors:
                if len(values):
                    message = dist.P2POp(op, values, self._ranks[peer], tag=tag)
                    messages.append(message)
        return messages

    def _message(self, device: torch.device) -> AbstractContextManager[None]:
        return self._progress.message(self._range, device)


def _one_each(tensors: Sequence[Tensor]) -> list[Tensors]:
    return [(peer, [values]) for peer, values in enumerate(tensors)]
