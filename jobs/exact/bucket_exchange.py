"""Brings the ranks' subtree sums together, bucket by bucket, while backward continues.

Of each bucket, every rank sends each other rank the part that the other one owns, finishes the tree over its own part,
and sends the result to all (but not with a sharded optimizer). With one subtree per rank, the bytes are those of a ring
all-reduce. Messages go straight from rank to rank, from and into permanent buffers.
"""

from collections.abc import Sequence

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
        parts = [layout.parts(rank, world_size=group.world_size) for rank in range(group.world_size)]
        self._own_parts = parts[group.rank]
        self._num_blocks = [sum(map(len, of_rank)) // BLOCK for of_rank in parts]
        self._block_order = _block_order(parts, device=buffers[0].device)
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
        by_node = {
            node: table[rank, num_blocks + k].to(losses[0].dtype)
            for rank, num_blocks in enumerate(self._num_blocks)
            for k, node in enumerate(self._nodes[rank])
        }
        ranks, places = self._block_order
        return float(tree_sum(self._root, by_node.get)), norm_of(table[ranks, places])

    def _gathered(self, own: Tensor) -> Tensor:
        """Returns every rank's vector as a row, padded to equal lengths."""
        lengths = [num_blocks + len(nodes) for num_blocks, nodes in zip(self._num_blocks, self._nodes, strict=True)]
        padded = own.new_zeros(max(lengths))
        padded[: len(own)] = own
        table = padded.new_empty(len(lengths), len(padded))
        dist.all_gather(list(table), padded)
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


def _block_order(parts: Sequence[Sequence[range]], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the rank (N,) that has each block of the flat buffer, and the block's place (N,) among that rank's own.
    `parts` has the parts of each rank, one of each bucket. The order is that of every step, and takes seconds of Python
    for 512 ranks."""
    sizes = torch.tensor([[len(part) // BLOCK for part in of_rank] for of_rank in parts])  # (W, buckets)
    starts = sizes.cumsum(1) - sizes
    counts = sizes.T.flatten()  # bucket by bucket, rank by rank
    ranks = torch.arange(len(parts)).repeat(sizes.shape[1]).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.arange(len(first)) - first + starts.T.flatten().repeat_interleave(counts)
    return ranks.to(device), places.to(device)


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
