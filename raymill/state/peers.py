"""Sends values between some of the ranks, this one among them.

One call sends and receives what a rank has for all others. To all of 512 a bucket takes 1.1 ms of
the host in one call, where a message for each pair of ranks took 9 ms (and messages cost nothing).
A subset of the ranks is small, and halving goes to one of them at a time: so these send one message
per pair.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from raymill.errors import LostPeerError, OpenGroupError
from raymill.workers.progress import CPU, range_of
from raymill.workers.worker_group import WorkerGroup

Tensors = tuple[int, list[Tensor]]
"""The number of a peer, and the tensors that are sent to it, or received from it, in order."""


class Peers:
    """Some ranks of a group, each of which has the number of its place here; this one is among
    them."""

    def __init__(self, ranks: Sequence[int], group: WorkerGroup) -> None:
        self.index = ranks.index(group.rank)
        self._ranks = ranks
        self._is_world = len(ranks) == group.world_size
        self._aborted = group.meeting.aborted
        self._progress = group.meeting.progress
        self._range = range_of(sorted(ranks))

    def __len__(self) -> int:
        return len(self._ranks)

    def exchange(
        self, received: Tensor, sent: Tensor, num_received: list[int], num_sent: list[int]
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

    def pass_on(
        self, sent: Sequence[Tensors], received: Sequence[Tensors], *, tag: int = 0
    ) -> None:
        """Sends each peer its tensors and receives others from each, in order; what it has for
        itself is copied."""
        if self._aborted.is_set():
            raise LostPeerError("the messages were aborted")
        kept_sources = self._kept(sent)
        kept_targets = self._kept(received)
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

    def _kept(self, tensors_of_peers: Sequence[Tensors]) -> list[Tensor]:
        """Returns the tensors that are this peer's own."""
        kept: list[Tensor] = []
        for peer, tensors in tensors_of_peers:
            if peer == self.index:
                kept += tensors
        return kept

    def _messages(
        self, op: Callable[..., object], tensors_of_peers: Sequence[Tensors], tag: int
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
