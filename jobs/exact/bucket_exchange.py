"""Brings the ranks' subtree sums together, bucket by bucket, while backward continues.

Of each bucket, every rank sends each other rank the part that the other one owns, finishes the tree over its own part,
and sends the result to all (but not with a sharded optimizer). With one subtree per rank, the bytes are those of a ring
all-reduce. Messages go straight from rank to rank, from and into permanent buffers.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.exact.exact_reduce import halves, maximal_subtrees, tree_sum
from jobs.exact.flat_layout import BLOCK, FlatLayout, at, part_of
from jobs.exact.side_thread import side_work
from jobs.tokens.batch_plan import lanes_of_rank
from jobs.workers.worker_group import WorkerGroup


class BucketExchange:
    """Exchanges the sums in `buffers`: the first K hold this rank's subtree sums (P,), the first becomes the whole sum.

    With `sharded`, only this rank's own parts of it do. `lane_counts` has the number of lanes of every step.
    """

    def __init__(
        self, layout: FlatLayout, buffers: list[Tensor], group: WorkerGroup, *, lane_counts: list[int], sharded: bool
    ) -> None:
        self._layout, self._buffers, self._group, self._sharded = layout, buffers, group, sharded
        self._nodes_of = {count: _nodes(count, world_size=group.world_size) for count in lane_counts}
        self._own_parts = layout.parts(group.rank, world_size=group.world_size)
        longest = max(len(part) for part in self._own_parts)
        num_foreign = max(sum(map(len, nodes)) - len(nodes[group.rank]) for nodes in self._nodes_of.values())
        self._received = buffers[0].new_empty(num_foreign, longest)
        self._block_sums: list[Tensor] = []
        self._side_work = side_work(buffers[0].device)

    def begin(self, num_lanes: int) -> None:
        """Prepares for the buckets of a step of so many lanes."""
        self._root, self._nodes = range(num_lanes), self._nodes_of[num_lanes]

    def start(self, bucket: int) -> None:
        """Starts the exchange of a bucket whose subtree sums are final; every rank starts the buckets in order."""
        if self._group.world_size > 1:
            self._side_work.submit(lambda: self._exchange(bucket))

    def close(self) -> None:
        self._side_work.close()

    def finish(self, losses: list[Tensor]) -> tuple[float, float]:
        """Waits for all buckets. Returns the loss, from its sums over the K subtrees, and the gradient's norm."""
        if self._group.world_size == 1:
            return float(losses[0]), gradient_norm(self._buffers[0])
        self._side_work.wait()
        table = self._gathered(torch.cat([*self._block_sums, torch.stack(losses).double()]))
        self._block_sums = []
        parts = [self._layout.parts(r, world_size=self._group.world_size) for r in range(self._group.world_size)]
        block_sums, taken = [], [0] * len(parts)
        for bucket in range(len(self._layout.buckets)):
            for r, row in enumerate(table):
                num_blocks = len(parts[r][bucket]) // BLOCK
                block_sums.append(row[taken[r] : taken[r] + num_blocks])
                taken[r] += num_blocks
        by_node = {
            node: row[taken[r] + k].to(losses[0].dtype)
            for r, row in enumerate(table)
            for k, node in enumerate(self._nodes[r])
        }
        return float(tree_sum(self._root, by_node.get)), norm_of(torch.cat(block_sums))

    def _gathered(self, own: Tensor) -> list[Tensor]:
        """Returns every rank's vector, padded to equal lengths."""
        lengths = [
            sum(len(part) for part in self._layout.parts(r, world_size=self._group.world_size)) // BLOCK + len(nodes)
            for r, nodes in enumerate(self._nodes)
        ]
        padded = own.new_zeros(max(lengths))
        padded[: len(own)] = own
        table = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(table, padded)
        return table

    def _exchange(self, bucket: int) -> None:
        rank, own = self._group.rank, self._own_parts[bucket]
        sums = self._buffers[: len(self._nodes[rank])]
        by_node = {node: at(values, own) for node, values in zip(self._nodes[rank], sums, strict=True)}
        foreign = iter(self._received)
        messages = []
        for peer, part in _parts_of_others(self._layout.buckets[bucket], self._group):
            messages += [dist.P2POp(dist.isend, at(values, part), peer) for values in sums]
            for node in self._nodes[peer]:
                by_node[node] = next(foreign)[: len(own)]
                messages.append(dist.P2POp(dist.irecv, by_node[node], peer))
        _run(messages)
        result = at(self._buffers[0], own)
        left, right = (tree_sum(half, by_node.get) for half in halves(self._root))
        torch.add(left, right, out=result)
        self._block_sums.append(block_square_sums(result))
        if not self._sharded:
            gather_parts(self._buffers[0], self._layout.buckets[bucket], self._group)


def _nodes(num_lanes: int, *, world_size: int) -> list[list[range]]:
    """Returns the subtrees whose sums each rank holds."""
    lanes = [lanes_of_rank(rank, world_size=world_size, num_lanes=num_lanes) for rank in range(world_size)]
    return [maximal_subtrees(each, root=range(num_lanes)) for each in lanes]


def gather_parts(flat: Tensor, bucket: range, group: WorkerGroup) -> None:
    """Sends each part of a bucket from the rank that owns it to all others."""
    own = part_of(bucket, group.rank, world_size=group.world_size)
    messages = []
    for peer, part in _parts_of_others(bucket, group):
        messages.append(dist.P2POp(dist.isend, at(flat, own), peer))
        messages.append(dist.P2POp(dist.irecv, at(flat, part), peer))
    _run(messages)


def _parts_of_others(bucket: range, group: WorkerGroup) -> list[tuple[int, range]]:
    """Returns (rank, its part) of each other rank."""
    others = [rank for rank in range(group.world_size) if rank != group.rank]
    return [(rank, part_of(bucket, rank, world_size=group.world_size)) for rank in others]


def _run(messages: list[dist.P2POp]) -> None:
    """Sends and receives everything at once, without the messages of empty parts."""
    if full := [message for message in messages if len(message.tensor)]:
        for work in dist.batch_isend_irecv(full):
            work.wait()


def block_square_sums(values: Tensor) -> Tensor:
    """Returns sums of squares (P / BLOCK,), in float64, of values (P,) that begin at a block; the last may be short.

    A block has the same bits whichever blocks are computed with it. Within a block fp32 suffices, in half the time of
    float64.
    """
    whole = len(values) - len(values) % BLOCK
    parts = [part for part in (values[:whole].view(-1, BLOCK), values[whole:].view(1, -1)) if part.numel()]
    sums = [torch.linalg.vector_norm(part, dim=1).double().square_() for part in parts]
    return torch.cat(sums) if sums else values.new_zeros(0, dtype=torch.float64)


def norm_of(block_sums: Tensor) -> float:
    """Returns the Euclidean norm from the sums of all blocks, in order."""
    return float(block_sums.sum().sqrt())


def gradient_norm(gradient: Tensor) -> float:
    """Returns the Euclidean norm of a gradient (P,)."""
    return norm_of(block_square_sums(gradient))
