"""Brings the ranks' subtree sums together, bucket by bucket, while backward continues.

Of each bucket, every rank sends each other rank the part that the other one owns, finishes the tree over its own part,
and sends the result to all (but not with a sharded optimizer). With one subtree per rank, the bytes are those of a ring
all-reduce. Messages go from and into permanent buffers.

One call sends and receives the parts of all ranks. With 512 of them a bucket takes 1.1 ms of the host, and 0.4 ms more
where NCCL gathers equal parts. With a message for each pair of ranks each took 9 ms (where messages cost nothing): four
seconds in a step of 1.3B parameters.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.exact.exact_reduce import halves, maximal_subtrees, tree_sum
from jobs.exact.flat_layout import BLOCK, FlatLayout, at, part_of
from jobs.exact.side_thread import SideStream, side_work
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
        self._lengths = [[len(of_rank[bucket]) for of_rank in parts] for bucket in range(len(layout.buckets))]
        self._num_blocks = [sum(map(len, of_rank)) // BLOCK for of_rank in parts]
        self._block_order = _block_order(parts, device=buffers[0].device)
        most_nodes = max(sum(map(len, nodes)) for nodes in self._nodes_of.values())
        self._received = buffers[0].new_empty(most_nodes * max(map(len, self._own_parts)))
        self._block_sums: list[Tensor] = []
        self._side_work = side_work(buffers[0].device)
        if isinstance(self._side_work, SideStream):
            group.streams.append(self._side_work.stream)

    def begin(self, step: int, num_lanes: int) -> None:
        """Prepares for the buckets of a step of so many lanes."""
        self._step, self._root, self._nodes = step, range(num_lanes), self._nodes_of[num_lanes]

    def start(self, bucket: int) -> None:
        """Starts the exchange of a bucket whose subtree sums are final; every rank starts the buckets in order."""
        if self._group.world_size > 1:
            self._side_work.submit(lambda: self._exchange(bucket))

    def close(self) -> None:
        self._side_work.close()

    def finish(self, losses: list[Tensor]) -> tuple[float, float]:
        """Waits for all buckets, which every rank then has whole. Returns the loss, from its sums over the K subtrees,
        and the gradient's norm. Raises `LostPeerError` where a message did not arrive."""
        if self._group.world_size == 1:
            return float(losses[0]), gradient_norm(self._buffers[0])
        self._side_work.wait()
        own = torch.cat([*self._block_sums, torch.stack(losses).double()])
        self._block_sums = []
        width = max(num_blocks + len(nodes) for num_blocks, nodes in zip(self._num_blocks, self._nodes, strict=True))
        table = self._group.proven(own, step=self._step, width=width)
        nodes = [(node, r, self._num_blocks[r] + k) for r, of in enumerate(self._nodes) for k, node in enumerate(of)]
        order, ranks, places = zip(*nodes, strict=True)
        values = table[list(ranks), list(places)].to(losses[0].dtype).cpu()
        return float(tree_sum(self._root, dict(zip(order, values, strict=True)).get)), norm_of(table[self._block_order])

    def _exchange(self, bucket: int) -> None:
        own, num_sums, start = self._own_parts[bucket], len(self._nodes[self._group.rank]), 0
        for k in range(max(map(len, self._nodes))):  # the k-th subtree sum of each rank that has so many
            sent, lengths = self._received[:0], [0] * self._group.world_size
            if k < num_sums:
                sent, lengths = at(self._buffers[k], self._layout.buckets[bucket]), self._lengths[bucket]
            received = [len(own) * (len(nodes) > k) for nodes in self._nodes]
            target = self._received[start : start + sum(received)]
            dist.all_to_all_single(target, sent, received, lengths)
            start += len(target)
        result = at(self._buffers[0], own)
        self._add_up(result)
        self._block_sums.append(block_square_sums(result))
        if not self._sharded:
            gather_parts(self._buffers[0], self._layout.buckets[bucket], self._group)

    def _add_up(self, result: Tensor) -> None:
        """Puts the whole sum of a part (P,) into `result`, from the sums of all nodes, own ones too, as received."""
        nodes, length = self._nodes, len(result)
        order = [of[k] for k in range(max(map(len, nodes))) for of in nodes if len(of) > k]
        rows = self._received[: len(order) * length].view(len(order), length)
        gap, num_rows = 1, len(rows)
        if num_rows == self._group.world_size and num_rows.bit_count() == 1:  # a whole level of the tree
            while 2 * gap < num_rows:
                rows[:: 2 * gap] += rows[gap :: 2 * gap]
                gap *= 2
            torch.add(rows[0], rows[gap], out=result)
            return
        by_node = dict(zip(order, rows, strict=True))
        left, right = (tree_sum(half, by_node.get) for half in halves(self._root))
        torch.add(left, right, out=result)


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
    parts = [part_of(bucket, rank, world_size=group.world_size) for rank in range(group.world_size)]
    own = at(flat, parts[group.rank])
    if flat.is_cuda and len(bucket) == group.world_size * len(own):  # NCCL then passes equal parts on from rank to rank
        dist.all_gather_single(at(flat, bucket), own)
        return
    messages = []
    for peer, part in enumerate(parts):
        if peer != group.rank:
            messages += [dist.P2POp(dist.isend, own, peer), dist.P2POp(dist.irecv, at(flat, part), peer)]
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
