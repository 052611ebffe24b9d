"""The exact sum as its definition reads, without buckets, reuse or overlap: what the fast one is compared with."""

from collections.abc import Callable

from torch import Tensor

from jobs.exact.exact_reduce import maximal_subtrees, tree_sum
from jobs.tokens.batch_plan import lanes_of_rank


def reduce_lanes(lanes: range, *, num_lanes: int, lane_value: Callable[[int], Tensor]) -> list[Tensor]:
    """One rank's subtree sums. Lanes are computed in order."""

    def leaf(node: range) -> Tensor | None:
        return lane_value(node.start) if len(node) == 1 else None

    return [tree_sum(subtree, leaf) for subtree in maximal_subtrees(lanes, root=range(num_lanes))]


def reduce_worlds(world_size: int, *, num_lanes: int, lane_value: Callable[[int], Tensor]) -> Tensor:
    """The whole sum, as a world of this size splits it."""
    by_node: dict[range, Tensor] = {}
    for rank in range(world_size):
        lanes = lanes_of_rank(rank, world_size=world_size, num_lanes=num_lanes)
        sums = reduce_lanes(lanes, num_lanes=num_lanes, lane_value=lane_value)
        by_node |= dict(zip(maximal_subtrees(lanes, root=range(num_lanes)), sums, strict=True))
    return tree_sum(range(num_lanes), by_node.get)
