"""Finishes the sum of a step's gradient among ranks, its peers, bucket by bucket, while backward
continues.

The sum is one binary tree over all lanes (`exact_reduce`), whichever peer computed a lane: so its
bits do not depend on the number of peers. Each peer comes with the sums of some subtrees, those of
its own lanes. It sends each part of a bucket to the part's owner, adds its own part of all subtrees
along the rest of the tree, and, with `sends_sums`, sends the result to all. With one subtree for
each peer, that is as many bytes as a ring all-reduce sends. Messages go from and into permanent
buffers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.exact.state.flat_layout import parts_of
from jobs.exact.state.peers import Peers
from jobs.exact.state.span import Span
from jobs.exact.sums.exact_reduce import halves, tree_sum
from jobs.exact.sums.step_totals import block_square_sums


class BucketExchange:
    """Exchanges the sums in `buffers`, each as long as the gradient.

    The first of them hold this peer's subtree sums, one each, and the very first becomes the whole
    sum. Without `sends_sums`, as with a sharded optimizer, only this peer's parts of it become
    whole. `most_subtrees` is the largest number of subtrees that all peers have together.
    """

    def __init__(
        self,
        buckets: Sequence[Span],
        buffers: list[Tensor],
        peers: Peers,
        *,
        most_subtrees: int,
        sends_sums: bool,
    ) -> None:
        self._buckets = buckets
        self._buffers = buffers
        self._peers = peers
        self._sends_sums = sends_sums
        self._own_parts: list[Span] = []
        self._lengths: list[list[int]] = []  # of each peer's part, by bucket
        for bucket in buckets:
            parts = parts_of(bucket, world_size=len(peers))
            self._own_parts.append(parts[peers.index])
            self._lengths.append([len(part) for part in parts])
        longest = max(map(len, self._own_parts))
        num_received = most_subtrees * longest if len(peers) > 1 else 0
        self._received = buffers[0].new_empty(num_received)
        self.block_sums: list[Tensor] = []
        """The sums of squares (`step_totals`) of this peer's parts of the whole sum, in the order
        of buckets."""

    def begin(
        self,
        subtrees: Sequence[Sequence[range]],
        num_lanes: int,
    ) -> None:
        """Prepares for the buckets of a step of so many lanes.

        `subtrees` has those of each peer, as ranges of lanes; two or more peers have at least two
        together.
        """
        self._root = range(num_lanes)
        self._num_subtrees = [len(nodes) for nodes in subtrees]
        self._order = _as_received(subtrees)
        # One whole level of the tree, in order, is added up a level at a time, in few calls.
        self._is_level = self._order == _level(self._root, len(self._order))
        self.block_sums = []

    def exchange(self, bucket: int) -> None:
        """Exchanges a bucket whose subtree sums are final; every peer takes the buckets in
        order."""
        result = self._own_parts[bucket].of(self._buffers[0])
        if len(self._peers) > 1:
            self._receive(bucket)
            self._add_up(result)
        self.block_sums.append(block_square_sums(result))
        if len(self._peers) > 1 and self._sends_sums:
            self._peers.gather(self._buffers[0], self._buckets[bucket])

    def _receive(self, bucket: int) -> None:
        """Exchanges the first subtree sum of each peer, then the second of each peer that has two,
        and so on."""
        own_length = len(self._own_parts[bucket])
        start = 0
        for number in range(max(self._num_subtrees)):
            num_received = [own_length if number < count else 0 for count in self._num_subtrees]
            target = self._received[start : start + sum(num_received)]
            if number < self._num_subtrees[self._peers.index]:
                source = self._buckets[bucket].of(self._buffers[number])
                num_sent = self._lengths[bucket]
            else:
                source = self._received[:0]
                num_sent = [0] * len(self._peers)
            self._peers.exchange(target, source, num_received, num_sent)
            start += len(target)

    def _add_up(self, result: Tensor) -> None:
        """Puts the whole sum of a part (P,) into `result`, from all subtree sums as received, its
        own among them."""
        count = len(self._order)
        length = len(result)
        rows = self._received[: count * length].view(count, length)
        if self._is_level:
            gap = 1
            while 2 * gap < count:
                rows[:: 2 * gap] += rows[gap :: 2 * gap]
                gap *= 2
            torch.add(rows[0], rows[gap], out=result)
            return
        by_node = dict(zip(self._order, rows, strict=True))
        left, right = halves(self._root)
        left_sum = tree_sum(left, by_node.get)
        right_sum = tree_sum(right, by_node.get)
        torch.add(left_sum, right_sum, out=result)


def _as_received(subtrees: Sequence[Sequence[range]]) -> list[range]:
    """Returns the subtrees of all peers in the order in which their sums arrive."""
    order: list[range] = []
    for number in range(max(map(len, subtrees))):
        order += [nodes[number] for nodes in subtrees if number < len(nodes)]
    return order


def _level(root: range, num_nodes: int) -> list[range]:
    """Returns the first level of the tree that has at least so many nodes, or the last one."""
    level = [root]
    while len(level) < num_nodes and len(level[0]) > 1:
        lower: list[range] = []
        for node in level:
            lower += halves(node)
        level = lower
    return level
