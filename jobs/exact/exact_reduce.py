"""Orders the exact gradient: a sum over lanes whose bits do not depend on which rank computed which lane.

Floating-point addition is not associative, so the order of a sum is part of its result. Here the order is a fixed
binary tree over the lanes [0, num_lanes), each node split at its middle. A rank reduces its contiguous lanes to the
maximal subtrees that they fill (`lane_sums`). The ranks exchange these by bucket and part, and each finishes the tree
over its own parts (`bucket_exchange`). With a power-of-two world each rank holds exactly one subtree.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def halves(node: range) -> tuple[range, range]:
    middle = (node.start + node.stop) // 2
    return range(node.start, middle), range(middle, node.stop)


def maximal_subtrees(lanes: range, *, root: range) -> list[range]:
    """Returns the fewest nodes of the tree under `root` whose leaves are exactly `lanes`, from left to right."""
    if root.start >= lanes.stop or root.stop <= lanes.start:
        return []
    if lanes.start <= root.start and root.stop <= lanes.stop:
        return [root]
    left, right = halves(root)
    return maximal_subtrees(lanes, root=left) + maximal_subtrees(lanes, root=right)


def tree_sum(root: range, value_of: "Callable[[range], Tensor | None]") -> "Tensor":
    """Returns the sum over the tree under `root`, from the left; `value_of` returns a node's value, or None to descend.

    Adds in place to the tensors that `value_of` returns.
    """
    value = value_of(root)
    if value is not None:
        return value
    left, right = halves(root)
    return tree_sum(left, value_of).add_(tree_sum(right, value_of))


@dataclass(frozen=True)
class LaneStep:
    """The use of one lane's value, by which lanes in order sum along the tree in few buffers."""

    buffer: int
    adds: bool  # to the buffer's value, its left sibling; else it replaces the buffer's value
    merges: int = 0  # how many times buffer n is then added to buffer n - 1, from `buffer` down


def lane_steps(lanes: range, *, num_lanes: int) -> list[LaneStep]:
    """Returns a step for each of a rank's lanes; after the last, buffer k holds the sum of the rank's k-th subtree."""
    subtrees = maximal_subtrees(lanes, root=range(num_lanes))
    return [step for buffer, subtree in enumerate(subtrees) for step in _steps_under(subtree, buffer)]


def _steps_under(node: range, buffer: int) -> list[LaneStep]:
    if len(node) == 1:
        return [LaneStep(buffer, adds=False)]
    left, right = halves(node)
    steps = _steps_under(left, buffer)
    if len(right) == 1:
        return [*steps, LaneStep(buffer, adds=True)]
    *others, last = _steps_under(right, buffer + 1)
    return [*steps, *others, replace(last, merges=last.merges + 1)]
