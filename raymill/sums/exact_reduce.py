"""Orders the exact gradient: a sum over lanes whose bits do not depend on which rank computed which
lane.

Floating-point addition is not associative, so the order of a sum is part of its result. Here the
order is a fixed binary tree over the lanes [0, num_lanes), each node split at its middle. A rank
computes the lanes of a few subtrees and sums each (`lane_sums`). The ranks finish the tree together
(`bucket_exchange`). With a power-of-two world each rank has exactly one subtree, and siblings pair
level by level (`teams`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def halves(node: range) -> tuple[range, range]:
    middle = (node.start + node.stop) // 2
    return range(node.start, middle), range(middle, node.stop)


@lru_cache(maxsize=16)
def subtrees_of_ranks(num_lanes: int, world_size: int) -> Sequence[Sequence[range]]:
    """Returns the subtrees of each rank, which together hold each lane once: as few as a greedy
    choice finds where no rank has more than ceil(num_lanes / world_size) lanes, and each has one.

    The bytes of the exchange follow their number. Of 64 lanes, four of seven ranks have a subtree
    of 8 and one of 2, and three have one of 8: 1.29 times a ring's bytes, where seven even
    stretches of lanes took 2.5 times.
    """
    if not 1 <= world_size <= num_lanes:
        raise ValueError(f"{world_size} ranks do not each have a lane of {num_lanes}")
    free = [-(-num_lanes // world_size)] * world_size
    subtrees: list[list[range]] = [[] for _ in range(world_size)]
    num_without = world_size
    waiting = [(-num_lanes, 0, 0)]  # subtrees without a rank, the largest first: size, depth, start
    size = 0
    # The ranks with room for `size` lanes, those with fewest subtrees first
    fitting: list[tuple[int, int]] = []
    while waiting:
        negative_size, depth, start = heappop(waiting)
        if -negative_size != size:  # few sizes differ: there are two at each depth of the tree
            size = -negative_size
            fitting = [
                (len(nodes), rank) for rank, nodes in enumerate(subtrees) if free[rank] >= size
            ]
            heapify(fitting)
        node = range(start, start + size)
        if not fitting or len(waiting) < num_without - 1:
            for half in halves(node):
                heappush(waiting, (-len(half), depth + 1, half.start))
            continue
        num_subtrees, rank = heappop(fitting)
        num_without -= num_subtrees == 0
        subtrees[rank].append(node)
        free[rank] -= size
        if free[rank] >= size:
            heappush(fitting, (num_subtrees + 1, rank))
    return sorted(subtrees, key=lambda nodes: nodes[0].start)


def tree_sum(root: range, value_of: "Callable[[range], Tensor | None]") -> "Tensor":
    """Returns the sum over the tree under `root`, from the left; `value_of` returns a node's value,
    or None to descend.

    Adds in place to the tensors that `value_of` returns.
    """
    value = value_of(root)
    if value is not None:
        return value
    left, right = halves(root)
    left_sum = tree_sum(left, value_of)
    return left_sum.add_(tree_sum(right, value_of))


@dataclass(frozen=True)
class LaneStep:
    """The handling of the next lane, or of the next piece of one: target buffer, add or replace, then
    how many buffers to merge."""

    buffer: int
    # To the buffer's value, its left sibling or the pieces before; else it replaces the buffer's
    # value
    adds: bool
    merges: int = 0  # how many times buffer n is then added to buffer n - 1, from `buffer` down


def lane_steps(subtrees: Sequence[range], *, num_pieces: int = 1) -> list[LaneStep]:
    """Returns a step for each piece of each lane of some subtrees, where a lane is the sum of its
    pieces in order; after the last, buffer k holds the sum of the k-th subtree."""
    steps: list[LaneStep] = []
    for buffer, subtree in enumerate(subtrees):
        steps += _steps_under(subtree, buffer, num_pieces)
    return steps


def num_buffers(subtrees: Sequence[range], *, num_pieces: int = 1) -> int:
    """Returns how many buffers the steps of some subtrees sum in: a subtree needs one for each
    level that it has above its lanes, and those before it hold one each."""
    most = 0
    for number, subtree in enumerate(subtrees):
        num_levels = (len(subtree) - 1).bit_length()
        needed = max(num_levels, 1) if num_pieces == 1 else num_levels + 1
        most = max(most, number + needed)
    return most


def _steps_under(node: range, buffer: int, num_pieces: int) -> list[LaneStep]:
    if len(node) == 1:
        return [LaneStep(buffer, adds=number > 0) for number in range(num_pieces)]
    left, right = halves(node)
    steps = _steps_under(left, buffer, num_pieces)
    if len(right) == 1 and num_pieces == 1:
        return [*steps, LaneStep(buffer, adds=True)]
    *others, last = _steps_under(right, buffer + 1, num_pieces)
    return [*steps, *others, replace(last, merges=last.merges + 1)]
