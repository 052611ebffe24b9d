"""The exact sum as its definition reads, without buckets, reuse or overlap: what the fast one is
compared with."""

from collections.abc import Callable, Sequence

from torch import Tensor

from raymill.sums.exact_reduce import subtrees_of_ranks, tree_sum


def reduce_lanes(subtrees: Sequence[range], *, lane_value: Callable[[int], Tensor]) -> list[Tensor]:
    """The sums of one rank's subtrees. Lanes are computed in order."""

    def leaf(node: range) -> Tensor | None:
        return lane_value(node.start) if len(node) == 1 else None

    return [tree_sum(subtree, leaf) for subtree in subtrees]


def reduce_worlds(
    world_size: int, *, num_lanes: int, lane_value: Callable[[int], Tensor]
) -> Tensor:
    """The whole sum, as a world of this size splits it."""
    by_node: dict[range, Tensor] = {}
    for subtrees in subtrees_of_ranks(num_lanes, world_size):
        by_node |= dict(zip(subtrees, reduce_lanes(subtrees, lane_value=lane_value), strict=True))
    return tree_sum(range(num_lanes), by_node.get)
