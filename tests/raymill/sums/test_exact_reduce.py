"""The order of the exact sum: its tree, and the steps that sum a rank's lanes along it in few
buffers."""

import sys
from collections.abc import Sequence
from functools import reduce
from types import FrameType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raymill.sums.exact_reduce import (
    halves,
    lane_steps,
    num_buffers,
    subtrees_of_ranks,
    tree_sum,
)
from tests.jobs.reference_reduce import reduce_lanes, reduce_worlds


def nodes_of(root: range) -> set[range]:
    """Returns all nodes of the tree under `root`."""
    return {root} if len(root) == 1 else {root}.union(*map(nodes_of, halves(root)))


@given(st.integers(1, 200), st.integers(1, 20))
def test_ranks_have_few_subtrees_that_hold_each_lane_once(num_lanes: int, world_size: int) -> None:
    world_size = min(world_size, num_lanes)
    ranks = subtrees_of_ranks(num_lanes, world_size)
    assert nodes_of(range(num_lanes)).issuperset(node for nodes in ranks for node in nodes)
    assert sorted(lane for nodes in ranks for node in nodes for lane in node) == [*range(num_lanes)]
    sizes = [sum(map(len, nodes)) for nodes in ranks]
    assert len(sizes) == world_size
    assert min(sizes) >= 1
    assert max(sizes) <= -(-num_lanes // world_size), "no rank delays the step"
    if world_size.bit_count() == 1:
        assert [len(nodes) for nodes in ranks] == [1] * world_size
        assert [nodes[0].start for nodes in ranks] == sorted(nodes[0].start for nodes in ranks)


def greedy_subtrees(num_lanes: int, world_size: int) -> list[list[range]]:
    """The choice as it reads: each subtree, the largest first, goes to the rank that has fewest of
    those with room for it, and is cut where there is none, or where too few subtrees would be
    left."""
    free = [-(-num_lanes // world_size)] * world_size
    ranks: list[list[range]] = [[] for _ in free]
    waiting = [(-num_lanes, 0, 0)]
    while waiting:
        waiting.sort()
        size, depth, start = waiting.pop(0)
        node = range(start, start - size)
        fitting = [rank for rank in range(world_size) if free[rank] >= len(node)]
        if fitting and len(waiting) >= ranks.count([]) - 1:
            rank = min(fitting, key=lambda rank: len(ranks[rank]))
            ranks[rank].append(node)
            free[rank] -= len(node)
        else:
            waiting += [(-len(half), depth + 1, half.start) for half in halves(node)]
    return sorted(ranks, key=lambda nodes: nodes[0].start)


@given(st.integers(1, 300), st.integers(1, 40))
def test_subtrees_are_those_of_the_greedy_choice(num_lanes: int, world_size: int) -> None:
    world_size = min(world_size, num_lanes)
    assert subtrees_of_ranks(num_lanes, world_size) == greedy_subtrees(num_lanes, world_size)


@pytest.mark.parametrize("world_size", [511, 512])
def test_subtrees_of_512_ranks__take_few_operations_a_rank(world_size: int) -> None:
    """Counts calls of Python's and C's functions, which `len`, a heap's step and a comparison's key
    are."""
    num_calls = 0

    def count(frame: FrameType, event: str, function: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    subtrees_of_ranks.cache_clear()
    sys.setprofile(count)
    try:
        subtrees_of_ranks(3000, world_size)
    finally:
        sys.setprofile(None)
    assert num_calls < 40 * world_size, "one rank after another was asked for each subtree"


@pytest.mark.parametrize(
    ("num_lanes", "world_size", "most"),
    [(64, 7, 1.29), (64, 63, 1.01), (64, 5, 1.9), (512, 56, 1.29), (512, 63, 1.07)],
)
def test_a_world_that_lost_a_worker_sends_little_more_than_a_ring(
    num_lanes: int, world_size: int, most: float
) -> None:
    num_subtrees = sum(map(len, subtrees_of_ranks(num_lanes, world_size)))
    assert (num_subtrees / world_size + 1) / 2 <= most


def test_subtrees_by_example() -> None:
    assert subtrees_of_ranks(8, 3) == [
        [range(2), range(6, 7)],
        [range(2, 4), range(7, 8)],
        [range(4, 6)],
    ]
    assert subtrees_of_ranks(5, 4) == [[range(1)], [range(1, 2)], [range(2, 3)], [range(3, 5)]]
    with pytest.raises(ValueError, match="3 ranks do not each have a lane of 2"):
        subtrees_of_ranks(2, 3)


def test_the_sum_follows_the_tree() -> None:
    """1e8 swallows a 3 in fp32, so the result shows the order."""
    values = [1e8, 3.0, 3.0, -1e8, 3.0]

    def leaf(node: range) -> Tensor | None:
        return torch.tensor(values[node.start]) if len(node) == 1 else None

    x = [torch.tensor(value) for value in values]
    canonical = (x[0] + x[1]) + (x[2] + (x[3] + x[4]))
    assert float(tree_sum(range(5), leaf)) == float(canonical)
    from_the_left = (((x[0] + x[1]) + x[2]) + x[3]) + x[4]
    assert float(from_the_left) != float(canonical)


def lane_value(lane: int) -> Tensor:
    """Returns (64,) of many magnitudes, so that each order of summing rounds differently."""
    generator = torch.Generator().manual_seed(lane)
    return torch.randn(64, generator=generator) * 10.0 ** torch.randint(
        -3, 4, (1,), generator=generator
    )


def stepped(subtrees: Sequence[range], num_pieces: int) -> list[Tensor]:
    """Returns the buffers after the steps of the subtrees' lanes, each in pieces."""
    steps = lane_steps(subtrees, num_pieces=num_pieces)
    buffers = [torch.full((64,), torch.nan) for _ in range(1 + max(step.buffer for step in steps))]
    pieces = [
        lane * num_pieces + n for subtree in subtrees for lane in subtree for n in range(num_pieces)
    ]
    for number, step in zip(pieces, steps, strict=True):
        buffers[step.buffer] = (
            buffers[step.buffer] + lane_value(number) if step.adds else lane_value(number)
        )
        for target in range(step.buffer - 1, step.buffer - 1 - step.merges, -1):
            buffers[target] += buffers[target + 1]
    return buffers


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 3))
def test_ranks_together_make_the_whole_tree(
    num_lanes: int, world_size: int, num_pieces: int
) -> None:
    """Each rank's buffers, finished by the tree, are the sum that one rank alone makes."""

    def of_lane(lane: int) -> Tensor:
        return reduce(torch.add, [lane_value(lane * num_pieces + n) for n in range(num_pieces)])

    by_node: dict[range, Tensor] = {}
    for subtrees in subtrees_of_ranks(num_lanes, min(world_size, num_lanes)):
        buffers = stepped(subtrees, num_pieces)
        for buffer, expected in zip(
            buffers, reduce_lanes(subtrees, lane_value=of_lane), strict=False
        ):
            assert torch.equal(buffer, expected)
        by_node |= dict(zip(subtrees, buffers, strict=False))
    alone = reduce_worlds(1, num_lanes=num_lanes, lane_value=of_lane)
    assert torch.equal(tree_sum(range(num_lanes), by_node.get), alone)


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 3))
def test_num_buffers_are_those_of_the_steps(
    num_lanes: int, world_size: int, num_pieces: int
) -> None:
    for subtrees in subtrees_of_ranks(num_lanes, min(world_size, num_lanes)):
        steps = lane_steps(subtrees, num_pieces=num_pieces)
        assert num_buffers(subtrees, num_pieces=num_pieces) == 1 + max(
            step.buffer for step in steps
        )


def test_buffers_are_as_few_as_the_tree_is_high() -> None:
    for height in range(7):
        steps = lane_steps([range(2**height)])
        assert max(step.buffer for step in steps) == max(height - 1, 0)
