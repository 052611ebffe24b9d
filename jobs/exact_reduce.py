"""The exact gradient: a sum over lanes whose bits do not depend on who computed which lane.

Floating-point addition is not associative, so the order of a sum is part of its result. Here the order is a fixed
binary tree over the lanes [0, num_lanes), each node split at its middle. A rank reduces its contiguous lanes to the
maximal subtrees that they fill; the ranks exchange those by parameter chunk (all-to-all); each finishes the tree
over its own chunk; an all-gather brings the whole back. With a power-of-two world each rank holds exactly one
subtree and the bytes moved equal a ring all-reduce's.

P is the number of summed values, W the world size, K the subtrees of one rank.
"""

from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import Tensor

from jobs.batch_plan import lanes_of_rank


def halves(node: range) -> tuple[range, range]:
    middle = (node.start + node.stop) // 2
    return range(node.start, middle), range(middle, node.stop)


def maximal_subtrees(lanes: range, *, root: range) -> list[range]:
    """The fewest nodes of the tree under `root` whose leaves are exactly `lanes`, from left to right."""
    if root.start >= lanes.stop or root.stop <= lanes.start:
        return []
    if lanes.start <= root.start and root.stop <= lanes.stop:
        return [root]
    left, right = halves(root)
    return maximal_subtrees(lanes, root=left) + maximal_subtrees(lanes, root=right)


def tree_sum(root: range, value_of: Callable[[range], Tensor | None]) -> Tensor:
    """The sum over the tree under `root`, from the left; `value_of` gives a node's value or None to descend.

    The tensors that `value_of` returns are added to in place.
    """
    value = value_of(root)
    if value is not None:
        return value
    left, right = halves(root)
    return tree_sum(left, value_of).add_(tree_sum(right, value_of))


def reduce_lanes(lanes: range, *, num_lanes: int, lane_value: Callable[[int], Tensor]) -> list[Tensor]:
    """One rank's subtree sums (K tensors). Lanes are computed in order; log2(num_lanes) sums are held at most."""

    def leaf(node: range) -> Tensor | None:
        return lane_value(node.start) if len(node) == 1 else None

    return [tree_sum(subtree, leaf) for subtree in maximal_subtrees(lanes, root=range(num_lanes))]


def exchange(subtree_sums: list[Tensor], *, rank: int, world_size: int, num_lanes: int) -> Tensor:
    """The whole tree's sum (P,), the same bits on every rank, from each rank's `reduce_lanes`."""
    root = range(num_lanes)
    nodes_of_rank = [
        maximal_subtrees(lanes_of_rank(r, world_size=world_size, num_lanes=num_lanes), root=root)
        for r in range(world_size)
    ]
    assert len(subtree_sums) == len(nodes_of_rank[rank])
    if world_size == 1:
        return subtree_sums[0]
    num_values = subtree_sums[0].numel()
    chunk = -(-num_values // world_size)
    sent = subtree_sums[0].new_zeros(world_size, len(subtree_sums), chunk)  # (W, K, chunk)
    for k, value in enumerate(subtree_sums):
        for r, part in enumerate(value.split(chunk)):
            sent[r, k, : part.numel()] = part
    counts = [len(nodes) for nodes in nodes_of_rank]
    received = sent.new_empty(sum(counts), chunk)  # a row for each subtree of each rank
    dist.all_to_all_single(received.view(-1), sent.view(-1), [count * chunk for count in counts])
    by_node = dict(zip(_flatten(nodes_of_rank), received.unbind(), strict=True))
    own = tree_sum(root, by_node.get)  # (chunk,)
    whole = own.new_empty(world_size, chunk)
    dist.all_gather(list(whole.unbind()), own)
    return whole.view(-1)[:num_values]


def _flatten(nodes_of_rank: list[list[range]]) -> Iterator[range]:
    for nodes in nodes_of_rank:
        yield from nodes
