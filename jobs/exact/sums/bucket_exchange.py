"""Brings the subtree sums of peers together, bucket by bucket, while backward continues.

Of each bucket, every peer sends each other one the part that the other one owns, finishes the tree over its own part,
and sends the result to all (but not with a sharded optimizer). With one subtree each, the bytes are those of a ring
all-reduce. Messages go from and into permanent buffers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.exact.state.flat_layout import at, part_of
from jobs.exact.state.peers import Peers
from jobs.exact.sums.exact_reduce import halves, tree_sum
from jobs.exact.sums.step_totals import block_square_sums


class BucketExchange:
    """Exchanges the sums in `buffers`: the first K hold this peer's subtree sums, the first becomes the whole sum.

    With `sharded`, only this peer's own parts of it do. `most_subtrees` is how many all peers have, at most.
    """

    def __init__(
        self, buckets: Sequence[range], buffers: list[Tensor], peers: Peers, *, most_subtrees: int, sharded: bool
    ) -> None:
        self._buckets, self._buffers, self._peers, self._sharded = buckets, buffers, peers, sharded
        self._parts = [[part_of(bucket, n, world_size=len(peers)) for n in range(len(peers))] for bucket in buckets]
        longest = max(len(parts[peers.index]) for parts in self._parts)
        self._received = buffers[0].new_empty(most_subtrees * longest if len(peers) > 1 else 0)
        self.block_sums: list[Tensor] = []
        """Of this peer's own parts of the whole sum, in the order of buckets."""

    def begin(self, subtrees: Sequence[Sequence[range]], num_lanes: int) -> None:
        """Prepares for the buckets of a step of so many lanes, with the subtrees of each peer."""
        self._subtrees, self._root, self.block_sums = subtrees, range(num_lanes), []
        self._order = [of[k] for k in range(max(map(len, subtrees))) for of in subtrees if len(of) > k]  # as received
        level = [self._root]
        while len(level) < len(self._order) and len(level[0]) > 1:
            level = [half for node in level for half in halves(node)]
        self._is_level = self._order == level

    def exchange(self, bucket: int) -> None:
        """Exchanges a bucket whose subtree sums are final; every peer takes the buckets in order."""
        own, start = self._parts[bucket][self._peers.index], 0
        result = at(self._buffers[0], own)
        if len(self._peers) > 1:
            num_own, num_peers = len(self._subtrees[self._peers.index]), len(self._peers)
            for k in range(max(map(len, self._subtrees))):  # the k-th subtree sum of each peer that has so many
                sent, lengths = self._received[:0], [0] * num_peers
                if k < num_own:
                    sent, lengths = at(self._buffers[k], self._buckets[bucket]), [*map(len, self._parts[bucket])]
                received = [len(own) * (len(subtrees) > k) for subtrees in self._subtrees]
                target = self._received[start : start + sum(received)]
                self._peers.exchange(target, sent, received, lengths)
                start += len(target)
            self._add_up(result)
        self.block_sums.append(block_square_sums(result))
        if len(self._peers) > 1 and not self._sharded:
            self._peers.gather(self._buffers[0], self._buckets[bucket])

    def _add_up(self, result: Tensor) -> None:
        """Puts the whole sum of a part (P,) into `result`, from all subtree sums, own ones too, as received."""
        length, gap = len(result), 1
        rows = self._received[: len(self._order) * length].view(len(self._order), length)
        if self._is_level:
            while 2 * gap < len(rows):
                rows[:: 2 * gap] += rows[gap :: 2 * gap]
                gap *= 2
            torch.add(rows[0], rows[gap], out=result)
            return
        by_node = dict(zip(self._order, rows, strict=True))
        left, right = (tree_sum(half, by_node.get) for half in halves(self._root))
        torch.add(left, right, out=result)
